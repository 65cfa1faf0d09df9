"""TTSA: two-timescale stochastic approximation. One SGD step on z, BSA's v, one step of x.

                                 z ← z - ρ ∇₁G_i(z, x)
    p uniform in {0 .. K-1},     v = -Kη Π_{j=1..p} (I - η ∇²₁₁G_j) ∇₁F      at the new z
                                 x ← x - γ (∇²₂₁G v + ∇₂F)

Published steps: ρ ∝ t^-2/5, γ ∝ t^-3/5.

References:
    M. Hong, H.-T. Wai, Z. Wang, Z. Yang. A two-timescale stochastic algorithm framework for
    bilevel optimization: complexity analysis and application to actor-critic. SIAM Journal on
    Optimization, 2023 (arXiv 2007.05170, 2020), Algorithm 1.
"""

from __future__ import annotations

from typing import Unpack

import optax

from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import nested, report_at
from bilevel_flax.solvers.nested.linear_solves import randomised_hypergradient
from bilevel_flax.solvers.nested.sampled_oracles import SampledOracles, first, split


@takes(Common)
def ttsa(
    problem: Problem,
    *,
    adjoint_step: float | optax.Schedule,
    inner_steps: int = 1,
    adjoint_steps: int = 10,
    **common: Unpack[Common],
) -> BilevelSolver:
    """TTSA: one inner step, randomised v, one outer step; 3 + (K - 1) / 2 units on average.

    Args:
        problem: the bilevel problem.
        adjoint_step: η, below 1 / (largest eigenvalue of ∇²₁₁G); a schedule counts updates.
        inner_steps: T, 1 in the source.
        adjoint_steps: K, the terms of the series, at least 1. `info.oracle_units` has the p that
            was drawn.
        **common: optimisers and weights, see `solvers.keywords`; z is on the faster
            timescale.

    Returns:
        A solver with `batches` (T + K, 1).

    Raises:
        ValueError: a number of steps or a step size out of range, weights that are no shares.

    Example:
        >>> import optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> step = optax.sgd(lambda t: 0.5 * (t + 1) ** -0.4), optax.sgd(lambda t: (t + 1) ** -0.6)
        >>> solver = bf.contrib.ttsa(problem, inner=step[0], outer=step[1], adjoint_step=0.5)
        >>> solver.batches, solver.units
        ((11, 1), 7.5)
    """
    check_count("inner_steps", inner_steps)
    check_count("adjoint_steps", adjoint_steps)
    check_positive("adjoint_step", adjoint_step)

    def step(sampled: SampledOracles, state, inner, outer):
        z, _, x = state.variables
        descent, system, cross = split(inner, inner_steps, adjoint_steps - 1, 1)
        z, opt_state, inner_out, norms = sampled.inner_sgd(z, state.inner_opt_state, x, descent)
        minibatches = system, first(cross), first(outer)
        estimate, factors = randomised_hypergradient(
            sampled, state, z, x, minibatches, adjoint_step, adjoint_steps, inner_out[1]
        )
        state = state.replace(inner_params=z, adjoint=estimate.adjoint, inner_opt_state=opt_state)
        units = inner_steps + 2 + factors
        return state, report_at(inner_out, estimate, norms, units=units)

    return nested(
        problem,
        step,
        name="ttsa",
        batches=(inner_steps + adjoint_steps, 1),
        units=inner_steps + 2 + (adjoint_steps - 1) / 2,
        **common,
    )
