"""Plain training of z with x fixed: the baseline that every bilevel run is compared with.

    z -= ρ ∇₁G(z, x)

x and v never move, the outer loss is never evaluated; 1 gradient unit a step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import (
    Batch,
    BilevelSolver,
    Finite,
    Info,
    Method,
    Problem,
    TrainState,
    Variables,
)
from bilevel_flax.checks import require_ids
from bilevel_flax.minibatches import importance_factors, scale
from bilevel_flax.solvers.initial_state import init_state
from bilevel_flax.solvers.step import rollback_unless
from bilevel_flax.tree import filter_inexact, norm


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
    weights = importance_factors("inner_weights", inner_weights)
    transform = optax.with_extra_args_support(inner)
    still = optax.set_to_zero()

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        transforms = Variables(transform, still, still)
        return init_state(
            problem, lambda _: (), transforms, inner_params, outer_params, model_state, rng
        )

    def update(state: TrainState, batch: Batch):
        require_ids(batch, "inner_only", {"inner": weights is not None})
        z, _, x = state.variables
        rng = jax.random.fold_in(state.rng, state.step) if problem.stateful else None
        (loss, aux), grad = oracles.inner_value_and_grad(
            problem, z, x, batch.inner, state.model_state, rng
        )
        factor = None if weights is None else weights[batch.inner_id]
        grad = filter_inexact(scale(grad, factor))
        updates, opt_state = transform.update(
            grad, state.inner_opt_state, filter_inexact(z), outer_params=x
        )
        size = norm(grad)
        alive = jnp.isfinite(size)
        stepped = state.replace(
            step=state.step + 1,
            inner_params=rows.apply_updates(z, updates),
            inner_opt_state=opt_state,
            model_state=aux.model_state if problem.stateful else state.model_state,
        )
        zero = jnp.zeros_like(size)
        info = Info(
            inner_loss=loss,
            outer_loss=None,
            norms=Variables(size, zero, zero),
            finite=Finite(alive, jnp.bool_(True), jnp.bool_(True)),
            adjoint_residual=jnp.ones_like(size),  # v is 0
            oracle_units=jnp.float32(1.0),
            metrics={f"inner_{name}": value for name, value in aux.metrics.items()},
        )
        return rollback_unless(alive, stepped, state), info

    return BilevelSolver(init, update, method=Method("inner_only", 1.0))
