"""Steps of x no longer than z can follow.

D_x is right where z has followed x. A step Δx shifts the inner gradient by ∇²₁₂G Δx, which z makes
up for by H Δz. Seen along v, which weighs what matters for F, the two are

    push = ⟨∇²₂₁G v, Δx⟩        pull = ⟨Hv, Δz⟩

and where the first is larger for long, x runs away from z: under Adam z walks by its learning rate
at most, whatever x does. So x walks at a pace m, a share of its own step. The lag, in whole steps
of x, is what z has not made up for, and from `max_lag` on z tells the pace:

    lag ← max(0, lag + m - pull / push)
    m ← min(1, growth · m, where lag > max_lag: pull / (θ · push))

in running means of |push| (of a whole step) and |pull|, the second as ‖Hv‖ / ‖v‖ · ⟨v, Δz⟩. If z
follows x at all, pull is m · push in the end, so m grows as fast as z responds. Neither the scale
of v, nor that of F or G matters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Table
from bilevel_flax.per_sample import RowTransformation

_DECAY = 0.9
_GROWTH = 1.1
_START, _SLOWEST = 0.1, 0.01


class PacedState(NamedTuple):
    """State of `paced`; scalars are float32."""

    pace: jax.Array  # m
    lag: jax.Array  # whole steps of x
    push: jax.Array
    pull: jax.Array
    curvature: jax.Array  # ‖Hv‖ / ‖v‖ when it was last known
    inner: Any  # the state of the transformation


def paced(
    transform: RowTransformation,
    *,
    max_lag: float = 0.0,
    share: float = 0.8,
    update_every: int = 1,
) -> RowTransformation:
    """Shortens the steps of dense leaves of x to what z can follow; rows are left alone.

    Args:
        transform: the optimiser of x.
        max_lag: whole steps of x, >= 0.
        share: θ in (0, 1), of its steps that z must have followed.
        update_every: steps of z for each of x.

    Returns:
        A transformation whose `update` needs the extra arguments `adjoint_product` (‖Hv‖),
        `adjoint_length` (‖v‖), `inner_step_along_adjoint` (⟨v, Δz⟩) and `through_inner`
        (`Evaluation.through_inner`), as `single_loop` hands them on. Without dense leaves it is
        `transform`.

    Raises:
        ValueError: `share` is not in (0, 1).
        TypeError: from `update`, without the extra arguments.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> outer = paced(bf.outer.robust_sgd(0.1))
        >>> x = jnp.array([1.0, 2.0])
        >>> step, _ = outer.update(
        ...     x, outer.init(x), x, adjoint_product=jnp.array(1.0), adjoint_length=jnp.array(1.0),
        ...     inner_step_along_adjoint=jnp.array(1e-3), through_inner=jnp.array(1.0),
        ... )
        >>> [round(float(value), 4) for value in step]  # z hardly moves, nor does x
        [-0.0007, -0.001]
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must lie in (0, 1)")

    def init(params):
        nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Table))
        inner = transform.init(params)
        if all(isinstance(node, Table) for node in nodes):
            return inner
        lag, push, pull, curvature = (jnp.zeros((), jnp.float32) for _ in range(4))
        return PacedState(jnp.float32(_START), lag, push, pull, curvature, inner)

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, PacedState):
            return transform.update(updates, state, params, **extra_args)
        names = ("adjoint_product", "adjoint_length", "inner_step_along_adjoint", "through_inner")
        missing = [name for name in names if extra_args.get(name) is None]
        if missing:
            raise TypeError(
                f"an optimiser of x lacks {', '.join(missing)}: use it as the outer= of a "
                "single-loop solver, which passes them"
            )
        product, length, along, through = (extra_args[name].astype(jnp.float32) for name in names)
        steps, inner = transform.update(updates, state.inner, params, **extra_args)

        def running(old, new):
            return _DECAY * old + (1 - _DECAY) * new

        known = (product > 0) & (length > 0)
        curvature = jnp.where(known, product / jnp.where(known, length, 1.0), state.curvature)
        pairs = zip(rows.dense_leaves(updates), rows.dense_leaves(steps), strict=True)
        slope = sum(jnp.vdot(d.astype(jnp.float32), s.astype(jnp.float32)) for d, s in pairs)
        push = running(state.push, jnp.abs(slope) * through)
        pull = running(state.pull, curvature * jnp.abs(along) * update_every)
        followed = jnp.where(push > 0, pull / jnp.where(push > 0, push, 1.0), 1.0)
        lag = jnp.maximum(state.lag + state.pace - followed, 0.0)
        limit = jnp.where(lag > max_lag, jnp.maximum(followed / share, _SLOWEST), 1.0)
        pace = jnp.minimum(jnp.minimum(limit, _GROWTH * state.pace), 1.0)

        def slowed(node):
            return node if rows.is_rows(node) else node * pace.astype(node.dtype)

        steps = jax.tree.map(slowed, steps, is_leaf=rows.is_rows)
        return steps, PacedState(pace, lag, push, pull, curvature, inner)

    return RowTransformation(init, update)
