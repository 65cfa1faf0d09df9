"""Steps of x no longer than z can follow.

D_x is right where z has followed x. A step Δx shifts the inner gradient by ∇²₁₂G Δx, which z makes
up for by H Δz. Seen along v, which weighs what matters for F, the two are

    push = ⟨∇²₂₁G v, Δx⟩        pull = ⟨Hv, Δz⟩

and where the first is larger for long, x runs away from z: under Adam z walks by its learning rate
at most, whatever x does. So x walks at a pace m, a share of its own step. What z has followed to is
kept beside x: of the gap x - y, every step takes the share of it that Δz makes up for,

    y += min(1, pull / |⟨∇²₂₁G v, x - y⟩|) · (x - y)

and, where z has other reasons to move, too (its start, a warm-up), so that the two cancel, what its
own gradient shows: z that is behind by x - y has ⟨v, D_z⟩ = ⟨∇²₂₁G v, x - y⟩. Where its mean over
50 steps, with two standard errors, is less, y goes to x as far as it is, within some τ steps. The
lag, in whole steps of x, is how far x is ahead of y in the direction in which it walks now,
less than 0 where it has turned back. The pace holds the lag below τ + `max_lag`:

    m ← min(1, growth · m, pull / push + 1 + (max_lag - lag) / τ)

in running means over τ = 10 steps of |push| (of a whole step) and |pull|, the second as ‖Hv‖ / ‖v‖
times ⟨v, Δz⟩. Neither the scale of v, nor that of F or G matters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Table
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.tree import dot

_DECAY, _SLOW = 0.9, 0.98
_SURE = 2.0  # standard errors
_GROWTH = 1.1
_START, _SLOWEST = 0.1, 0.01


class PacedState(NamedTuple):
    """State of `paced`; scalars are float32."""

    pace: jax.Array  # m
    reached: Any  # y, tree of x; None for tables
    ahead: jax.Array  # ⟨D_x, x - y⟩
    slope: jax.Array  # ⟨D_x, Δx⟩ of a whole step
    shift: jax.Array  # ⟨∇²₂₁G v, x - y⟩
    push: jax.Array
    pull: jax.Array
    behind: jax.Array  # what `shift` would be in truth, ⟨v, D_z⟩; with the next two over 50 steps
    behind_squared: jax.Array
    slow_shift: jax.Array
    curvature: jax.Array  # ‖Hv‖ / ‖v‖ when it was last known
    inner: Any  # the state of the transformation


def paced(
    transform: RowTransformation,
    *,
    max_lag: float = 0.0,
    update_every: int = 1,
) -> RowTransformation:
    """Shortens the steps of dense leaves of x to what z can follow; rows are left alone.

    Args:
        transform: the optimiser of x.
        max_lag: whole steps of x, >= 0, that it may go ahead beyond the first τ.
        update_every: steps of z for each of x.

    Returns:
        A transformation whose `update` needs the extra arguments `adjoint_product` (‖Hv‖),
        `adjoint_length` (‖v‖), `inner_step_along_adjoint` (⟨v, Δz⟩),
        `inner_gradient_along_adjoint` (⟨v, D_z⟩) and `through_inner` (`Evaluation.through_inner`),
        as `single_loop` hands them on. Without dense leaves it is `transform`.

    Raises:
        TypeError: from `update`, without the extra arguments.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> outer = paced(bf.outer.robust_sgd(0.1))
        >>> x = jnp.zeros(2)
        >>> state, one = outer.init(x), jnp.array(1.0)
        >>> for _ in range(100):  # z stands still, and so does x after a while
        ...     step, state = outer.update(
        ...         jnp.ones(2), state, x, adjoint_product=one, adjoint_length=one,
        ...         inner_step_along_adjoint=0 * one, inner_gradient_along_adjoint=100 * one,
        ...         through_inner=one,
        ...     )
        ...     x += step
        >>> [round(float(value), 4) for value in step]
        [-0.001, -0.001]
    """

    def is_table(node):
        return isinstance(node, Table)

    def init(params):
        nodes = jax.tree.leaves(params, is_leaf=is_table)
        inner = transform.init(params)
        if all(map(is_table, nodes)):
            return inner
        zero = jnp.zeros((), jnp.float32)
        reached = jax.tree.map(
            lambda node: None if is_table(node) else jnp.array(node), params, is_leaf=is_table
        )
        return PacedState(jnp.float32(_START), reached, *[zero] * 9, inner=inner)

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, PacedState):
            return transform.update(updates, state, params, **extra_args)
        names = (
            "adjoint_product",
            "adjoint_length",
            "inner_step_along_adjoint",
            "inner_gradient_along_adjoint",
            "through_inner",
        )
        missing = [name for name in names if extra_args.get(name) is None]
        if missing:
            raise TypeError(
                f"an optimiser of x lacks {', '.join(missing)}: use it as the outer= of a "
                "single-loop solver, which passes them"
            )
        product, length, along, gradient, through = (
            extra_args[name].astype(jnp.float32) for name in names
        )
        steps, inner = transform.update(updates, state.inner, params, **extra_args)

        def running(old, new, decay=_DECAY):
            return decay * old + (1 - decay) * new.astype(jnp.float32)

        known = (product > 0) & (length > 0)
        curvature = jnp.where(known, product / jnp.where(known, length, 1.0), state.curvature)
        gap = jax.tree.map(
            lambda y, leaf: None if y is None else leaf - y,
            state.reached,
            params,
            is_leaf=lambda node: node is None,
        )
        d_x = rows.dense_leaves(updates)
        slope = running(state.slope, dot(d_x, rows.dense_leaves(steps)))
        along_gap = dot(d_x, jax.tree.leaves(gap))
        ahead, shift = running(state.ahead, along_gap), running(state.shift, along_gap * through)
        push = running(state.push, jnp.abs(dot(d_x, rows.dense_leaves(steps))) * through)
        pull = running(state.pull, curvature * jnp.abs(along) * update_every)
        behind = running(state.behind, gradient, _SLOW)
        squared = running(state.behind_squared, gradient**2, _SLOW)
        slow_shift = running(state.slow_shift, along_gap * through, _SLOW)
        noise = jnp.sqrt(jnp.maximum(squared - behind**2, 0.0) * (1 - _SLOW) / (1 + _SLOW))
        at_most = _quotient(jnp.abs(behind) + _SURE * noise, jnp.abs(slow_shift))
        found = (1 - _DECAY) * jnp.maximum(1 - at_most, 0.0)
        share = jnp.minimum(_quotient(pull, jnp.abs(shift)) + found, 1.0)
        reached = jax.tree.map(lambda y, g: y + share.astype(g.dtype) * g, state.reached, gap)
        lag = jnp.where(slope < 0, ahead / jnp.where(slope < 0, slope, 1.0), 0.0)
        limit = _quotient(pull, push) + 1 + (1 - _DECAY) * (max_lag - lag)
        pace = jnp.minimum(jnp.maximum(limit, _SLOWEST), jnp.minimum(_GROWTH * state.pace, 1.0))

        def slowed(node):
            return node if rows.is_rows(node) else node * pace.astype(node.dtype)

        steps = jax.tree.map(slowed, steps, is_leaf=rows.is_rows)
        means = ahead, slope, shift, push, pull, behind, squared, slow_shift, curvature
        return steps, PacedState(pace, reached, *means, inner)

    return RowTransformation(init, update)


def _quotient(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """Top / bottom; 1 where there is nothing to follow."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 1.0)
