"""SGD on x in units of x: neither the scale nor the tails of D_x matter.

While a deep network trains, D_x changes its scale by orders of magnitude (v grows, the inner step
decays) and a few examples have a hundred times the typical entry. A root mean square follows
these few, and everything else stands still (`docs/auto.md` has the numbers), so the unit here is
the typical entry, and no entry counts for more than `clip` of them:

    a_t = β a_{t-1} + (1 - β) mean|D_x|        x -= γ clip(D_x / (a_t / (1 - βᵗ)), ±c)

One number for each leaf, so within the clip the geometry is SGD's. The mean runs over the rows
that the minibatch visited. γ is how far a typical entry moves when it is visited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import rows
from bilevel_flax.base import Rows, Table
from bilevel_flax.single_loop import RowTransformation


class RobustState(NamedTuple):
    """State of `robust_sgd`."""

    count: jax.Array  # int32, steps taken
    size: Any  # float32 scalar for each leaf of x, running mean of |D_x|


def robust_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    dense_learning_rate: optax.ScalarOrSchedule | None = None,
    decay: float = 0.99,
    clip: float = 1.0,
    catch_up: float = 0.0,
) -> RowTransformation:
    """Row-sparse SGD with each leaf's direction in units of its typical entry, clipped.

    Args:
        learning_rate: γ, in units of x, or a schedule of the step count.
        dense_learning_rate: γ of leaves that are not per-sample: they move in every step, a row
            only when its example is visited. None: as `learning_rate`.
        decay: β of the running mean, in [0, 1).
        clip: c > 0, the largest move in units of γ.
        catch_up: rows are visited in a share b/n of the steps only. Where this is not 0 their γ is
            n/b times as long, but at most `catch_up`: Σ_t γ_t is then how far a row travels in
            the run, whatever n, the minibatch b and the number of epochs.

    Raises:
        ValueError: `decay` is outside [0, 1), `clip` is not positive, `catch_up` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> outer = robust_sgd(0.1)
        >>> x = jnp.zeros(4)
        >>> update, _ = outer.update(jnp.array([1e-9, -1e-9, 0.0, 1e-6]), outer.init(x), x)
        >>> [round(float(value), 4) for value in update]
        [-0.0004, 0.0004, -0.0, -0.1]
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must lie in [0, 1)")
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive")
    if not catch_up >= 0:
        raise ValueError(f"catch_up={catch_up} must be >= 0")
    dense = learning_rate if dense_learning_rate is None else dense_learning_rate

    def init(params):
        sizes = jax.tree.map(
            lambda _: jnp.zeros(()), params, is_leaf=lambda node: isinstance(node, Table)
        )
        return RobustState(jnp.zeros((), jnp.int32), sizes)

    def typical(node, leaf):
        if not rows.is_rows(node):
            return jnp.mean(jnp.abs(node.astype(jnp.float32)))
        real = node.index < leaf.shape[0]
        by_row = jnp.abs(node.values.astype(jnp.float32)).reshape(len(node.index), -1).mean(1)
        return jnp.sum(jnp.where(real, by_row, 0.0)) / jnp.maximum(jnp.sum(real), 1)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("robust_sgd needs params: update(updates, state, params)")
        sizes = jax.tree.map(typical, updates, params, is_leaf=rows.is_rows)
        size = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.size, sizes)
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = 1 - decay ** count.astype(jnp.float32)

        def step(node, size, leaf):
            if rows.is_rows(node):
                rate = now(learning_rate)
                if catch_up:
                    rate = jnp.minimum(rate * (leaf.shape[0] / len(node.index)), catch_up)
                return Rows(node.index, move(node.values, size, rate))
            return move(node, size, now(dense))

        def now(rate):
            return jnp.asarray(rate(state.count) if callable(rate) else rate)

        def move(values, size, rate):
            unit = size / correction
            # 0 / 0 where a direction was zero ever since: no move.
            relative = values.astype(jnp.float32) / jnp.where(unit > 0, unit, 1.0)
            return (-rate * jnp.clip(relative, -clip, clip)).astype(values.dtype)

        moved = jax.tree.map(step, updates, size, params, is_leaf=rows.is_rows)
        return moved, RobustState(count, size)

    return RowTransformation(init, update)
