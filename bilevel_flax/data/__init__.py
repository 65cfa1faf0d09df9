"""Data: finite sums of minibatches, resumable samplers, sources, label noise, prefetching."""

from bilevel_flax.data.finite_sum import FiniteSum, gather, partition
from bilevel_flax.data.noise import check_labels, corrupt_labels, standardize
from bilevel_flax.data.prefetch import Prefetcher, chunks, fits_on_device
from bilevel_flax.data.random_access import from_grain
from bilevel_flax.data.sampler import Sampler
from bilevel_flax.data.sources import ImageData, load
from bilevel_flax.data.split import stratified
from bilevel_flax.data.streamed import streamed

__all__ = [
    "FiniteSum",
    "ImageData",
    "Prefetcher",
    "Sampler",
    "check_labels",
    "chunks",
    "corrupt_labels",
    "fits_on_device",
    "from_grain",
    "gather",
    "load",
    "partition",
    "standardize",
    "stratified",
    "streamed",
]
