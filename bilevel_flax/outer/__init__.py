"""Ready-made outer parameters and optimisers for them."""

from bilevel_flax.outer import sample_weights
from bilevel_flax.outer.lazy import lazy_adam, lazy_sgd
from bilevel_flax.outer.meta_weight_net import meta_weight_net
from bilevel_flax.outer.normalized import normalized_sgd
from bilevel_flax.outer.robust import robust_sgd
from bilevel_flax.outer.sample_weights import SampleWeights, sigmoid, softmax

__all__ = [
    "SampleWeights",
    "lazy_adam",
    "lazy_sgd",
    "meta_weight_net",
    "normalized_sgd",
    "robust_sgd",
    "sample_weights",
    "sigmoid",
    "softmax",
]
