"""Data: finite sums of minibatches, resumable samplers, label noise, prefetching."""

from bilevel_flax import deprecated
from bilevel_flax.data.finite_sum import FiniteSum, gather, partition, subsample
from bilevel_flax.data.noise import check_labels, corrupt_labels, standardize
from bilevel_flax.data.prefetch import Prefetcher, chunks, fits_on_device
from bilevel_flax.data.sampler import Sampler
from bilevel_flax.data.split import stratified
from bilevel_flax.data.streamed import streamed

__all__ = [
    "FiniteSum",
    "Prefetcher",
    "Sampler",
    "check_labels",
    "chunks",
    "corrupt_labels",
    "fits_on_device",
    "gather",
    "partition",
    "standardize",
    "stratified",
    "streamed",
    "subsample",
]

__getattr__ = deprecated.names(__name__)
