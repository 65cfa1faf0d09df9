"""Weights of the training examples: one learned number for each.

x is a vector [n] of logits, and the inner loss is mean_i w_i ℓ_i. The published hypercleaning
task uses w_i = σ(x_i) with x₀ = -2.

References:
    L. Franceschi, M. Donini, P. Frasconi, M. Pontil. Forward and reverse gradient-based
    hyperparameter optimization. ICML 2017 (data hypercleaning).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax.base import PyTree
from bilevel_flax.checks import at_least, check_count
from bilevel_flax.minibatches import example_mask, integers
from bilevel_flax.tree import rows_at


class SampleWeights(NamedTuple):
    """A parametrisation of per-sample weights.

    Attributes:
        init: `init()`, where x starts: the logits float32 [n], or a network's parameters.
        apply: `apply(outer_params, batch, losses=None) -> [batch]`, the minibatch's weights. What
            it is handed in `outer_params` is the rows [batch] where `per_sample`, else all of x.
        weights: `weights(outer_params, losses=None) -> [n]`, the weights of all examples.
        per_sample: what to pass as `Problem(per_sample=...)` for this leaf.
        by_loss: `apply` and `weights` need the examples' unweighted losses.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> weights = bf.outer.sigmoid(1000)
        >>> x = weights.init()
        >>> weights.per_sample, x.shape, weights.weights(x).shape
        (True, (1000,), (1000,))
    """

    init: Callable[[], PyTree]
    apply: Callable[..., jax.Array]
    weights: Callable[..., jax.Array]
    per_sample: bool
    by_loss: bool = False


def sigmoid(num_samples: int, init: float = -2.0) -> SampleWeights:
    """w_i = σ(x_i) in (0, 1), each row on its own.

    Args:
        num_samples: n, the number of training examples.
        init: the initial logit of every example.

    Raises:
        ValueError: n is not a positive integer, or `init` is no number.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> weights = bf.outer.sigmoid(1000, init=0.0)
        >>> x = weights.init()
        >>> weights.apply(x[:2], {"index": jnp.array([0, 1])}).tolist()  # of a minibatch's rows
        [0.5, 0.5]
    """
    check_count("num_samples", num_samples)
    at_least("init", init, -math.inf)

    def apply(outer_params, batch, losses=None):
        del batch, losses
        return jax.nn.sigmoid(outer_params)

    def weights(outer_params, losses=None):
        del losses
        return jax.nn.sigmoid(outer_params)

    return SampleWeights(lambda: jnp.full((num_samples,), init), apply, weights, True)


def softmax(num_samples: int, init: float = 0.0) -> SampleWeights:
    """Softmax weights w_i = n eˣⁱ / Σ_k eˣᵏ: positive, with mean 1 over the whole training set.

    The normaliser couples all examples, so x is differentiated as a whole (O(n) a step); with
    n in the millions use `sigmoid`.

    Args:
        num_samples: n, the number of training examples.
        init: the initial logit of every example (any value gives equal weights).

    Raises:
        ValueError: n is not a positive integer; at trace time `batch["index"]` is missing.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> weights = bf.outer.softmax(1000)
        >>> rows = weights.apply(weights.init(), {"index": jnp.array([0, 1])})  # of all of x
        >>> [round(float(weight), 3) for weight in rows]
        [1.0, 1.0]
    """
    check_count("num_samples", num_samples)

    def weights(outer_params, losses=None):
        del losses
        return num_samples * jax.nn.softmax(outer_params)

    def apply(outer_params, batch, losses=None):
        del losses
        index, mask = integers(batch, "index", "softmax weights"), example_mask(batch)
        if mask is not None:
            index = jnp.where(mask > 0, index, 0)  # a padded example may point anywhere
        logits = rows_at(outer_params, index)
        return num_samples * jnp.exp(logits - jax.nn.logsumexp(outer_params))

    return SampleWeights(lambda: jnp.full((num_samples,), init), apply, weights, False)
