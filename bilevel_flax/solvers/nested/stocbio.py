"""stocBiO: inner SGD, then a Neumann series on fresh minibatches, then a step of x.

    T times      z ← z - ρ ∇₁G_i(z, x)
    then         v = -η Σ_{k=0..Q} Π_{j=1..k} (I - η ∇²₁₁G_j) ∇₁F
    then         x ← x - γ (∇²₂₁G v + ∇₂F)

v starts anew in every update; each of the Q factors has a minibatch of its own.

References:
    K. Ji, J. Yang, Y. Liang. Bilevel optimization: convergence analysis and enhanced design.
    ICML 2021, Algorithm 2.
"""

from __future__ import annotations

from typing import Unpack

import optax

from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import nested, report_at
from bilevel_flax.solvers.nested.linear_solves import hypergradient, neumann
from bilevel_flax.solvers.nested.sampled_oracles import SampledOracles, at_step, first, split


@takes(Common)
def stocbio(
    problem: Problem,
    *,
    adjoint_step: float | optax.Schedule,
    inner_steps: int = 10,
    adjoint_steps: int = 10,
    **common: Unpack[Common],
) -> BilevelSolver:
    """stocBiO: T inner steps, Q Hessian products, one outer step; T + Q + 2 gradient units.

    Args:
        problem: the bilevel problem.
        adjoint_step: η, below 1 / (largest eigenvalue of ∇²₁₁G); a schedule counts updates.
        inner_steps: T, at least 1.
        adjoint_steps: Q, at least 0.
        **common: optimisers and weights, see `solvers.keywords`.

    Returns:
        A solver with `batches` (T + Q + 1, 1).

    Raises:
        ValueError: a number of steps or a step size out of range, weights that are no shares.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> step = optax.sgd(0.5)
        >>> solver = bf.stocbio(problem, inner=step, outer=step, adjoint_step=0.5)
        >>> solver.batches, solver.units
        ((21, 1), 22.0)
    """
    check_count("inner_steps", inner_steps)
    check_count("adjoint_steps", adjoint_steps, 0)
    check_positive("adjoint_step", adjoint_step)

    def step(sampled: SampledOracles, state, inner, outer):
        z, _, x = state.variables
        descent, system, cross = split(inner, inner_steps, adjoint_steps, 1)
        z, opt_state, inner_out, norms = sampled.inner_sgd(z, state.inner_opt_state, x, descent)
        solve = neumann(at_step(adjoint_step, state.step))
        minibatches = system, first(cross), first(outer)
        estimate = hypergradient(sampled, z, x, *minibatches, solve, inner_out[1])
        state = state.replace(inner_params=z, adjoint=estimate.adjoint, inner_opt_state=opt_state)
        return state, report_at(inner_out, estimate, norms)

    return nested(
        problem,
        step,
        name="stocbio",
        batches=(inner_steps + adjoint_steps + 1, 1),
        units=inner_steps + adjoint_steps + 2,
        **common,
    )
