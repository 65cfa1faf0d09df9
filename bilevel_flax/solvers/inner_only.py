"""Plain training of z with x fixed: the baseline that every bilevel run is compared with.

    z -= ρ ∇₁G(z, x)

x and v never move, the outer loss is never evaluated; 1 gradient unit a step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax.base import (
    Batch,
    BilevelSolver,
    Finite,
    Method,
    Problem,
    TrainState,
    Variables,
)
from bilevel_flax.checks import require_ids
from bilevel_flax.minibatches import importance_factors
from bilevel_flax.oracles.evaluate import evaluate_inner
from bilevel_flax.oracles.oracle import bind
from bilevel_flax.solvers.initial_state import init_state
from bilevel_flax.solvers.single_loop import inner_extra_args
from bilevel_flax.solvers.step import make_info, optimizer_step, rollback_unless, tolerant
from bilevel_flax.tree import norm


def inner_only(
    problem: Problem,
    *,
    inner: optax.GradientTransformation,
    inner_weights: Any = None,
) -> BilevelSolver:
    """Trains the inner parameters alone, in the same loop as a bilevel solver.

    Args:
        problem: its outer loss is not used.
        inner: optimiser of z.
        inner_weights: as `single_loop`.
    """
    checks.optimizer("inner", inner)
    weights = importance_factors("inner_weights", inner_weights)
    transforms = Variables(tolerant(inner), *2 * (optax.set_to_zero(),))

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        return init_state(
            problem, lambda _: (), transforms, inner_params, outer_params, model_state, rng
        )

    def update(state: TrainState, batch: Batch):
        require_ids(batch, "inner_only", {"inner": weights is not None})
        oracle = bind(problem, state, batch, factors=(weights, None))
        if problem.stateful:  # the key of earlier versions, whose runs go on
            key = jax.random.fold_in(state.rng, state.step)
            oracle = dataclasses.replace(oracle, rngs=(key, None))
        evaluation = oracle.directions(state.variables, evaluate_inner)
        directions: Any = evaluation.directions
        d_z = directions.inner
        size = norm(d_z)
        none = jnp.zeros_like(size)
        alive = jnp.isfinite(size)
        z, opt_state = optimizer_step(
            transforms.inner,
            d_z,
            state.inner_opt_state,
            state.inner_params,
            **inner_extra_args(oracle, evaluation, state, d_z),
        )
        stepped = state.replace(
            step=state.step + 1,
            inner_params=z,
            inner_opt_state=opt_state,
            model_state=evaluation.model_state if problem.stateful else state.model_state,
        )
        info = make_info(
            evaluation._replace(residual=jnp.ones_like(size)),  # v is 0
            Variables(size, none, none),
            Finite(alive, jnp.bool_(True), jnp.bool_(True)),
            1.0,
        )
        return rollback_unless(alive, stepped, state), info

    return BilevelSolver(init, update, method=Method("inner_only", 1.0))
