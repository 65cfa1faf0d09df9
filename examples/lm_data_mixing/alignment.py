"""The mixture by the alignment of gradients: an example helps if its gradient points as F's does.

    z -= ρ ∇₁G        x -= γ ∇²₂₁G v        v = -∇₁F(z)

Instead of the adjoint, which knows of the curvature and of all steps to come, the gradient of F
itself: what one step of plain SGD on z would change. 2.7 gradient units a step.

References:
    X. Wang, H. Pham, P. Michel, A. Anastasopoulos, J. Carbonell, G. Neubig. Optimizing data usage
    via differentiable rewards (DDS). ICML 2020.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax.base import Finite, Method
from bilevel_flax.solvers.initial_state import init_state
from bilevel_flax.solvers.step import all_finite, rollback_unless
from bilevel_flax.tree import norm


def gradient_alignment(
    problem: bf.Problem, *, inner: optax.GradientTransformation, outer: optax.GradientTransformation
) -> bf.BilevelSolver:
    """A solver for problems whose x has no per-sample leaves and does not enter F.

    Args:
        problem: stateful, as weights that select examples are.
        inner: optimiser of z.
        outer: optimiser of x.
    """
    moves_z, moves_x = (optax.with_extra_args_support(t) for t in (inner, outer))

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        transforms = bf.Variables(moves_z, optax.set_to_zero(), moves_x)
        return init_state(
            problem, lambda _: (), transforms, inner_params, outer_params, model_state, rng
        )

    def update(state: bf.TrainState, batch: bf.Batch):
        z, _, x = state.variables
        rng = jax.random.fold_in(state.rng, state.step)
        (outer_loss, _), target, _ = oracles.outer_value_and_grads(
            problem, z, x, batch.outer, state.model_state, rng
        )
        against = jax.tree.map(jnp.negative, target)
        (loss, _), grad, cross = oracles.inner_grad_and_cross(
            problem, bf.Variables(z, against, x), batch.inner, state.model_state, rng
        )
        step_z, inner_opt_state = moves_z.update(grad, state.inner_opt_state, z)
        step_x, outer_opt_state = moves_x.update(cross, state.outer_opt_state, x)
        norms = bf.Variables(norm(grad), norm(against), norm(cross))
        finite = Finite(*(jnp.isfinite(size) for size in norms))
        stepped = state.replace(
            step=state.step + 1,
            inner_params=optax.apply_updates(z, step_z),
            outer_params=optax.apply_updates(x, step_x),
            inner_opt_state=inner_opt_state,
            outer_opt_state=outer_opt_state,
        )
        info = bf.Info(
            inner_loss=loss,
            outer_loss=outer_loss,
            norms=norms,
            finite=finite,
            adjoint_residual=jnp.full_like(loss, jnp.nan),
            oracle_units=jnp.float32(1 + oracles.FORWARD_UNITS),
            metrics={},
        )
        return rollback_unless(all_finite(finite), stepped, state), info

    method = Method("dds", 1 + oracles.FORWARD_UNITS)
    return bf.BilevelSolver(init, update, method=method)
