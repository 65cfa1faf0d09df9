"""SGD on x in units of x: neither the scale nor the tails of D_x matter.

While a deep network trains, D_x changes its scale by orders of magnitude (v grows, the inner step
decays) and a few examples have a hundred times the typical entry. A root mean square follows
these few, and everything else stands still (`docs/auto.md` has the numbers), so the unit here is
the typical entry, and no entry counts for more than `clip` of them:

    a_t = β a_{t-1} + (1 - β) mean|D_x|        x -= γ clip(D_x / (a_t / (1 - βᵗ)), ±c)

One number for each leaf, so within the clip the geometry is SGD's. The mean runs over the rows
that the minibatch visited. γ is how far a typical entry moves when it is visited.

With `max_learning_rate`, γ_max, γ is only where the step of rows starts. Rows whose visits agree
have gone some way d from where they started, and then a visit moves them by as much again:

    γ_t = min(max(γ, 2 d_t), γ_max)        d_t = running mean |x - x_0| over the visited rows

A start that is too small by a factor r is made up for in about log_3 r visits. Steps that grow with
the distance gone are how parameter-free methods do without a learning rate (there d_t / √t).

References:
    M. Ivgi, O. Hinder, Y. Carmon. DoG is SGD's best friend: a parameter-free dynamic step size
    schedule. ICML 2023.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks, deprecated
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Rows, Table
from bilevel_flax.per_sample import RowTransformation


class RobustState(NamedTuple):
    """State of `robust_sgd`."""

    count: jax.Array  # int32, steps taken
    size: Any  # float32 scalar for each leaf of x, running mean of |D_x|
    start: Any  # the same, mean of x_0
    spread: Any  # the same, mean of |x_0 - start|
    distance: Any  # the same, running mean of |x - start|, of rows


def mean_over_rows(node: Any, leaf: jax.Array, size: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The mean of `size(values)` over a dense leaf, or over the visited rows of a per-sample one.

    Args:
        node: a direction's leaf, dense or `Rows`.
        leaf: x's leaf; a row's index of its length stands for "no row".
        size: of an array of float32, entry by entry.

    Returns:
        A float32 scalar; 0 where no row was visited.
    """
    if not rows.is_rows(node):
        return jnp.mean(size(node.astype(jnp.float32)))
    real = node.index < leaf.shape[0]
    by_row = size(node.values.astype(jnp.float32)).reshape(len(node.index), -1).mean(1)
    return jnp.sum(jnp.where(real, by_row, 0.0)) / jnp.maximum(jnp.sum(real), 1)


@deprecated.renamed_arguments(most="max_learning_rate")
def robust_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    dense_learning_rate: optax.ScalarOrSchedule | None = None,
    decay: float = 0.99,
    clip: float = 1.0,
    catch_up: float = 0.0,
    max_learning_rate: optax.ScalarOrSchedule | None = None,
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
        max_learning_rate: what the γ of rows may grow to, made longer by `catch_up` as γ is; None:
            it does not grow. Where γ is larger, this takes its place.

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
    checks.learning_rate("learning_rate", learning_rate)
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must lie in [0, 1)")
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive")
    if not catch_up >= 0:
        raise ValueError(f"catch_up={catch_up} must be >= 0")
    dense = learning_rate if dense_learning_rate is None else dense_learning_rate

    def init(params):
        leaves = jax.tree.map(
            lambda node: node.rows if isinstance(node, Table) else node,
            params,
            is_leaf=lambda node: isinstance(node, Table),
        )
        zeros = jax.tree.map(lambda _: jnp.zeros(()), leaves)
        start = jax.tree.map(lambda leaf: jnp.mean(leaf.astype(jnp.float32)), leaves)
        spread = jax.tree.map(lambda leaf, at: jnp.mean(jnp.abs(leaf - at)), leaves, start)
        return RobustState(jnp.zeros((), jnp.int32), zeros, start, spread, zeros)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("robust_sgd needs params: update(updates, state, params)")
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = 1 - decay ** count.astype(jnp.float32)

        def running(old, new):
            return decay * old + (1 - decay) * new

        def now(rate):
            return jnp.asarray(rate(state.count) if callable(rate) else rate)

        def gone(node, leaf, start):
            if not rows.is_rows(node):
                return jnp.zeros(())
            here = Rows(node.index, leaf.at[node.index].get(mode="fill", fill_value=0))
            return mean_over_rows(here, leaf, lambda values: jnp.abs(values - start))

        def row_rate(node, leaf, spread, distance):
            rate = now(learning_rate)
            longer = leaf.shape[0] / len(node.index) if catch_up else 1.0
            if max_learning_rate is not None:
                far = jnp.maximum(distance / correction - spread, 0.0)
                limit = now(max_learning_rate)
                rate = jnp.minimum(jnp.maximum(rate, 2 * far / longer), limit)
            return jnp.minimum(rate * longer, catch_up) if catch_up else rate

        def move(values, size, rate):
            unit = size / correction
            # 0 / 0 where a direction was zero ever since: no move.
            relative = values.astype(jnp.float32) / jnp.where(unit > 0, unit, 1.0)
            return (-rate * jnp.clip(relative, -clip, clip)).astype(values.dtype)

        def step(node, size, leaf, spread, distance):
            if rows.is_rows(node):
                rate = row_rate(node, leaf, spread, distance)
                return Rows(node.index, move(node.values, size, rate))
            return move(node, size, now(dense))

        def over(function, *trees):
            return jax.tree.map(function, *trees, is_leaf=rows.is_rows)

        typical = over(functools.partial(mean_over_rows, size=jnp.abs), updates, params)
        size = jax.tree.map(running, state.size, typical)
        distance = jax.tree.map(running, state.distance, over(gone, updates, params, state.start))
        moved = over(step, updates, size, params, state.spread, distance)
        return moved, state._replace(count=count, size=size, distance=distance)

    return RowTransformation(init, update)
