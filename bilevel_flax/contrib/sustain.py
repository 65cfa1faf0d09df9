"""SUSTAIN: MRBO's recursion with BSA's randomised Neumann series, the same p at both points.

    p uniform in {0 .. K-1},     v = -Kη' Π_{j=1..p} (I - η' ∇²₁₁G_j) ∇₁F
    d_z ← η D_z(now) + (1 - η) (d_z + D_z(now) - D_z(previous))          z ← z - ρ d_z
    d_x ← η D(now)   + (1 - η) (d_x + D(now)   - D(previous))            x ← x - γ d_x

Both points see the same minibatches. The first directions are plain (η = 1). Published steps:
ρ, γ ∝ t^-1/3, η ∝ t^-2/3.

References:
    P. Khanduri, S. Zeng, M. Hong, H.-T. Wai, Z. Wang, Z. Yang. A near-optimal algorithm for
    stochastic bilevel optimization via double-momentum. NeurIPS 2021, Algorithm 1.
"""

from __future__ import annotations

from typing import Unpack

import optax

from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.contrib.mrbo import momentum_decay, recursive_step, start
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import nested
from bilevel_flax.solvers.nested.linear_solves import draw_factors, randomised_neumann
from bilevel_flax.solvers.nested.sampled_oracles import SampledOracles, at_step, first, split
from bilevel_flax.solvers.storm import check_eta


@takes(Common)
def sustain(
    problem: Problem,
    *,
    adjoint_step: float | optax.Schedule,
    adjoint_steps: int = 10,
    eta: float | optax.Schedule = momentum_decay,
    **common: Unpack[Common],
) -> BilevelSolver:
    """SUSTAIN: STORM on both levels, randomised v; 6 + (K - 1) units on average.

    Args:
        problem: the bilevel problem.
        adjoint_step: η', below 1 / (largest eigenvalue of ∇²₁₁G); a schedule counts updates.
        adjoint_steps: K, the terms of the series, at least 1. `info.oracle_units` has the p that
            was drawn.
        eta: η in [0, 1], 1 is no memory; a schedule counts updates.
        **common: optimisers and weights, see `solvers.keywords`; `outer` is no row-sparse
            one.

    Returns:
        A solver with `batches` (K + 1, 1).

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
        >>> solver = bf.contrib.sustain(problem, inner=step, outer=step, adjoint_step=0.5)
        >>> solver.batches, solver.units
        ((11, 1), 15.0)
    """
    check_count("adjoint_steps", adjoint_steps)
    check_positive("adjoint_step", adjoint_step)
    decay = check_eta(eta)

    def step(sampled: SampledOracles, state, inner, outer):
        gradient, system, cross = split(inner, 1, adjoint_steps - 1, 1)
        factors = draw_factors(state.rng, state.step, adjoint_steps)
        step_size = at_step(adjoint_step, state.step)
        solve = randomised_neumann(step_size, adjoint_steps, factors)
        minibatches = first(gradient), system, first(cross), first(outer)
        state, report = recursive_step(sampled, state, solve, decay, *minibatches)
        return state, report._replace(units=2 * (3 + factors))

    return nested(
        problem,
        step,
        name="sustain",
        memory=start,
        batches=(adjoint_steps + 1, 1),
        units=2 * 3 + (adjoint_steps - 1),
        row_directions=False,
        **common,
    )
