"""Ready-made outer parameters and optimisers for them."""

from bilevel_flax.outer import sample_weights
from bilevel_flax.outer.sample_weights import SampleWeights, sigmoid, softmax

__all__ = ["SampleWeights", "sample_weights", "sigmoid", "softmax"]
