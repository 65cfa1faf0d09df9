"""Weights from a small network on the loss: x is the network, whatever the number of examples.

    w_i = σ(V(ℓ_i; x))      V: one hidden layer of ReLUs

A wrong label has a large loss as long as z has not fitted it, so a function of the loss alone can
tell it from most right ones. ℓ_i counts as a number in w_i: neither z nor v sees through it. V
starts flat (its last layer is 0), with every weight σ(bias).

References:
    J. Shu, Q. Xie, L. Yi, Q. Zhao, S. Zhou, Z. Xu, D. Meng. Meta-Weight-Net: learning an explicit
    mapping for sample weighting. NeurIPS 2019.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel_flax.checks import check_count
from bilevel_flax.minibatches import example_mask
from bilevel_flax.outer.sample_weights import SampleWeights


def meta_weight_net(hidden: int = 100, init: float = 0.0, seed: int = 0) -> SampleWeights:
    """Weights in (0, 1) from a 1-hidden-1 network on each example's loss.

    Args:
        hidden: units of the hidden layer, >= 1.
        init: the logit of every weight at the start.
        seed: of the first layer.

    Returns:
        The parametrisation; x is a dict of "first" and "last", each with a "kernel" [hidden] and a
        "bias" ([hidden], []), float32. `apply` and `weights` need `losses`, float [batch] (or [n]).

    Raises:
        ValueError: `hidden` is not a positive integer; from `apply`, `losses` missing.

    Example:
        >>> import jax.numpy as jnp
        >>> net = meta_weight_net()
        >>> [float(w) for w in net.apply(net.init(), {}, jnp.array([0.1, 5.0]))]
        [0.5, 0.5]
    """
    check_count("hidden", hidden)

    def start():
        at, scale = jax.random.split(jax.random.PRNGKey(seed))
        # Kinks spread over the losses that matter: a few nats.
        kinks = jax.random.uniform(at, (hidden,), maxval=5.0)
        slopes = jax.random.normal(scale, (hidden,))
        return {
            "first": {"kernel": slopes, "bias": -slopes * kinks},
            "last": {"kernel": jnp.zeros(hidden), "bias": jnp.float32(init)},
        }

    def weights(outer_params, losses=None):
        if losses is None:
            raise ValueError(
                "meta_weight_net weighs by the loss: apply(outer_params, batch, losses)"
            )
        values = jax.lax.stop_gradient(losses)
        first, last = outer_params["first"], outer_params["last"]
        out = jax.nn.relu(jnp.outer(values, first["kernel"]) + first["bias"][None])
        return jax.nn.sigmoid(out @ last["kernel"] / jnp.sqrt(float(hidden)) + last["bias"])

    def apply(outer_params, batch, losses=None):
        mask = example_mask(batch)
        if losses is not None and mask is not None:
            losses = jnp.where(mask > 0, losses, 0.0)  # the loss of padding need not be finite
        return weights(outer_params, losses)

    return SampleWeights(start, apply, weights, per_sample=False, by_loss=True)
