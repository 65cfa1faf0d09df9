"""MRBO: momentum-based recursive bilevel optimisation. STORM on z and on the Neumann direction.

With D_z = ∇₁G and D = ∇²₂₁G v + ∇₂F, v stocBiO's Neumann series, both evaluated on the same
minibatches at the point now and at the previous one,

    d_z ← η D_z(now) + (1 - η) (d_z + D_z(now) - D_z(previous))          z ← z - ρ d_z
    d_x ← η D(now)   + (1 - η) (d_x + D(now)   - D(previous))            x ← x - γ d_x

The first directions are plain (η = 1). Published steps: ρ, γ ∝ t^-1/3, η ∝ t^-2/3.

References:
    J. Yang, K. Ji, Y. Liang. Provably faster algorithms for bilevel optimization. NeurIPS 2021,
    Algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax.numpy as jnp
import optax

from bilevel_flax import per_sample as rows
from bilevel_flax.base import BilevelSolver, Problem, PyTree, TrainState
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.memory import averages
from bilevel_flax.solvers.nested.frame import nested, report_at
from bilevel_flax.solvers.nested.linear_solves import hypergradient, neumann
from bilevel_flax.solvers.nested.sampled_oracles import (
    SampledOracles,
    at_step,
    axpy,
    difference,
    first,
    split,
)
from bilevel_flax.solvers.storm import check_eta
from bilevel_flax.tree import norm, zeros_like


class MRBOState(NamedTuple):
    """The previous point and the directions taken there."""

    inner_params: PyTree  # tree of z
    outer_params: PyTree  # tree of x
    inner: PyTree  # d_z, in float32 at least
    outer: PyTree  # d_x, dense, likewise


def start(variables) -> MRBOState:
    """Previous = initial point: the first difference is zero."""
    z, v, x = variables
    return MRBOState(z, x, averages.widened(v), averages.widened(zeros_like(x)))


def momentum_decay(t):
    """(t + 1)^-2/3, the published rate."""
    return (jnp.asarray(t, float) + 1.0) ** (-2 / 3)


def recursive_step(
    sampled: SampledOracles, state: TrainState, solve, decay, gradient, system, cross, outer
):
    """One STORM update of (d_z, d_x) and of z; MRBO's and SUSTAIN's.

    Args:
        sampled: of the update.
        state: before it.
        solve: the adjoint's approximation, the same at both points.
        decay: the schedule of η.
        gradient: the Minibatch of D_z.
        system: the Minibatches of the Hessian products.
        cross: the Minibatch of the cross-JVP.
        outer: the Minibatch of F.
    """
    z, _, x = state.variables
    before: MRBOState = state.estimator_state
    eta = jnp.where(state.step == 0, 1.0, decay(state.step))

    inner_out, d_z = sampled.inner_grad(z, x, gradient)
    now = hypergradient(sampled, z, x, system, cross, outer, solve, inner_out[1])
    old_z, old_x = before.inner_params, before.outer_params
    _, old_d_z = sampled.inner_grad(old_z, old_x, gradient)
    old = hypergradient(sampled, old_z, old_x, system, cross, outer, solve, inner_out[1])

    d_z, old_d_z, d_x, old_d_x = map(
        averages.widened,
        (d_z, old_d_z, rows.densify(now.d_x, x), rows.densify(old.d_x, old_x)),
    )
    d_z = axpy(1 - eta, difference(before.inner, old_d_z), d_z)
    d_x = axpy(1 - eta, difference(before.outer, old_d_x), d_x)
    handed_z, handed_x = averages.in_dtypes_of(z, d_z), averages.in_dtypes_of(x, d_x)
    new_z, opt_state = sampled.inner_step(
        z, state.inner_opt_state, x, gradient, inner_out[0], handed_z
    )
    state = state.replace(
        inner_params=new_z,
        adjoint=now.adjoint,
        inner_opt_state=opt_state,
        estimator_state=MRBOState(z, x, d_z, d_x),
    )
    return state, report_at(inner_out, now, norm(d_z), handed_x)


@takes(Common)
def mrbo(
    problem: Problem,
    *,
    adjoint_step: float | optax.Schedule,
    adjoint_steps: int = 10,
    eta: float | optax.Schedule = momentum_decay,
    **common: Unpack[Common],
) -> BilevelSolver:
    """MRBO: STORM on both levels, Neumann directions at two points; 2 (Q + 3) gradient units.

    Args:
        problem: the bilevel problem.
        adjoint_step: step of the Neumann series, below 1 / (largest eigenvalue of ∇²₁₁G); a
            schedule counts updates.
        adjoint_steps: Q, Hessian products in a series, at least 0.
        eta: η in [0, 1], 1 is no memory; a schedule counts updates.
        **common: optimisers and weights, see `solvers.keywords`; `outer` is no row-sparse
            one.

    Returns:
        A solver with `batches` (Q + 2, 1).

    Raises:
        ValueError: `adjoint_steps`, `adjoint_step` or `eta` out of range, weights that are
            no shares.

    Example:
        >>> import optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> step = optax.sgd(lambda t: 0.5 * (t + 1) ** (-1 / 3))
        >>> solver = bf.contrib.mrbo(problem, inner=step, outer=step, adjoint_step=0.5)
        >>> solver.batches, solver.units
        ((12, 1), 26.0)
    """
    check_count("adjoint_steps", adjoint_steps, 0)
    check_positive("adjoint_step", adjoint_step)
    decay = check_eta(eta)

    def step(sampled: SampledOracles, state, inner, outer):
        gradient, system, cross = split(inner, 1, adjoint_steps, 1)
        solve = neumann(at_step(adjoint_step, state.step))
        minibatches = first(gradient), system, first(cross), first(outer)
        return recursive_step(sampled, state, solve, decay, *minibatches)

    return nested(
        problem,
        step,
        name="mrbo",
        memory=start,
        batches=(adjoint_steps + 2, 1),
        units=2 * (adjoint_steps + 3),
        row_directions=False,
        **common,
    )
