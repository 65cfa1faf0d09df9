"""Is the loss of a minibatch a mean? A sum makes steps grow with the minibatch."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, Problem, PyTree, TrainState, Variables
from bilevel_flax.checks import batch as check_batch
from bilevel_flax.diagnostics.place import place
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.weighted_sums import loss_growth

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

    For a mean the whole is the mean of the halves, for a sum their sum. Of a loss that is neither
    (with a penalty of its own weight, say) the program is asked whether a term of it is a sum;
    where that does not say so either (contrastive losses, BatchNorm) it is left alone.

    Args:
        problem: the problem; stateful and per-sample ones too.
        point: a `TrainState` (its model state and key are used), or `Variables`.
        batch: leaves [batch, ...], without padding; a side that is None is left out.
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
    check_batch(batch, sides=())
    point, model_state, rng = place(problem, point, model_state, rng)

    def value(make: Any, minibatch: PyTree) -> jax.Array:
        loss, z, x, *_ = make(problem, point.inner, point.outer, minibatch, model_state, rng)
        return loss(z.leaves, x.leaves)[0]

    for name, make in (("inner_loss", losses.inner), ("outer_loss", losses.outer)):
        minibatch = getattr(batch, name.removesuffix("_loss"))
        if minibatch is None:
            continue
        halves = (jax.tree.map(lambda leaf, i=i: _half(leaf, i), minibatch) for i in (0, 1))
        whole, *parts = (float(value(make, part)) for part in (minibatch, *halves))
        total = sum(parts)
        found = ""
        if abs(whole) > 0 and abs(whole - total) <= _TOLERANCE * abs(whole):
            found = (
                f"{name} of a minibatch is {whole:.6g}, the sum of those of its halves "
                f"({parts[0]:.6g} and {parts[1]:.6g})"
            )
        elif loss_growth(problem, name, point[::2], minibatch, (model_state, rng)).power > 0:
            found = f"a term of {name} is a sum over the minibatch's examples"
        if found:
            message = (
                f"{found}, so steps grow with the minibatch: return the mean, or (sum, weight) "
                "under bf.oracles.weighted_sums"
            )
            warnings.warn(message, stacklevel=2)
            return message
    return ""


def _half(leaf: Any, number: int) -> Any:
    if not jnp.ndim(leaf):
        return leaf
    size = leaf.shape[0] // 2
    return leaf[number * size : (number + 1) * size]
