"""Is the loss of a minibatch a mean? A sum makes steps grow with the minibatch."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, Problem, PyTree, TrainState, Variables
from bilevel_flax.diagnostics.place import place
from bilevel_flax.oracles import losses

_TOLERANCE = 1e-3  # relative


def check_means(
    problem: Problem,
    point: TrainState | Variables,
    batch: Batch,
    *,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
) -> str:
    """Compares the losses of a minibatch with those of its two halves; call it once.

    For a mean the whole is the mean of the halves, for a sum their sum. Losses that are neither
    (a penalty of its own weight, contrastive ones, BatchNorm) are left alone.

    Args:
        problem: the problem; stateful and per-sample ones too.
        point: a `TrainState` (its model state and key are used), or `Variables`.
        batch: both sides, leaves [batch, ...] of an even length, without padding.
        model_state: of a stateful problem; None: the state's.
        rng: of a stateful problem; None: the state's.

    Returns:
        What is wrong, which a warning has said as well; "" where nothing is.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> loss = lambda z, x, batch: jnp.mean((z - x * batch) ** 2)
        >>> point = bf.Variables(jnp.array(1.0), jnp.array(0.0), jnp.array(0.5))
        >>> batch = bf.Batch(jnp.arange(4.0), jnp.arange(4.0))
        >>> bf.diagnostics.check_means(bf.Problem(loss, loss), point, batch)
        ''
    """
    point, model_state, rng = place(problem, point, model_state, rng)

    def value(make: Any, minibatch: PyTree) -> jax.Array:
        loss, z, x, *_ = make(problem, point.inner, point.outer, minibatch, model_state, rng)
        return loss(z.leaves, x.leaves)[0]

    for name, make in (("inner_loss", losses.inner), ("outer_loss", losses.outer)):
        minibatch = getattr(batch, name.removesuffix("_loss"))
        halves = (jax.tree.map(lambda leaf, i=i: _half(leaf, i), minibatch) for i in (0, 1))
        whole, *parts = (float(value(make, part)) for part in (minibatch, *halves))
        total = sum(parts)
        is_sum = abs(whole - total) <= _TOLERANCE * abs(whole)
        if is_sum and abs(whole) > 0:
            message = (
                f"{name} of a minibatch is {whole:.6g}, the sum of those of its halves "
                f"({parts[0]:.6g} and {parts[1]:.6g}), so steps grow with the minibatch: "
                "return the mean, or (sum, weight) under bf.oracles.weighted_sums"
            )
            warnings.warn(message, stacklevel=2)
            return message
    return ""


def _half(leaf: Any, number: int) -> Any:
    if not jnp.ndim(leaf):
        return leaf
    size = leaf.shape[0] // 2
    return leaf[number * size : (number + 1) * size]
