"""Step sizes as part of the state: one compiled chunk then serves every pair of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, BilevelSolver, PyTree, TrainState

Build = Callable[[Any, Any], BilevelSolver]


class Steps(NamedTuple):
    """What stands in place of the outer optimiser's state.

    Attributes:
        rho: ρ, a scalar.
        ratio: ρ / γ, a scalar.
        rest: the outer optimiser's state.
    """

    rho: jax.Array
    ratio: jax.Array
    rest: PyTree


def can_vary(build: Build) -> bool:
    """Whether `build` takes steps that are known only at run time."""

    def attempt(rho, ratio):
        build(rho, ratio)
        return rho

    try:
        jax.eval_shape(attempt, 0.1, 1.0)
    except (TypeError, jax.errors.ConcretizationTypeError):
        return False
    return True


def with_steps(build: Build, rho: float, ratio: float) -> BilevelSolver:
    """The solver `build(rho, ratio)` whose `update` reads its steps from the state.

    The updates of two such solvers are the same function: a state of one may be handed to the
    other, and moves with the steps that it was made with.

    Args:
        build: `build(rho, ratio) -> BilevelSolver`, for which `can_vary` holds.
        rho: ρ of the states that `init` makes.
        ratio: ρ / γ of the same.
    """
    fixed = build(rho, ratio)

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        state = fixed.init(inner_params, outer_params, model_state=model_state, rng=rng)
        dtype = jnp.result_type(float)
        steps = Steps(jnp.array(rho, dtype), jnp.array(ratio, dtype), state.outer_opt_state)
        return state.replace(outer_opt_state=steps)

    def plain(state: TrainState) -> TrainState:
        return state.replace(outer_opt_state=state.outer_opt_state.rest)

    def packed(state: TrainState, steps: Steps) -> TrainState:
        return state.replace(outer_opt_state=steps._replace(rest=state.outer_opt_state))

    def live(state: TrainState) -> BilevelSolver:
        return build(state.outer_opt_state.rho, state.outer_opt_state.ratio)

    def update(state: TrainState, batch: Batch):
        new, info = live(state).update(plain(state), batch)
        return packed(new, state.outer_opt_state), info

    def refresh(state: TrainState, batch: Batch):
        return packed(live(state).refresh(plain(state), batch), state.outer_opt_state)

    return fixed._replace(
        init=init,
        update=update,
        refresh=refresh,
        next_refresh=lambda state: fixed.next_refresh(plain(state)),
        refresh_cursor=lambda state: fixed.refresh_cursor(plain(state)),
    )
