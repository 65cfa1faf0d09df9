"""BSA: bilevel stochastic approximation. A randomised Neumann series, x moves, then z catches up.

    p uniform in {0 .. K-1},     v = -Kη Π_{j=1..p} (I - η ∇²₁₁G_j) ∇₁F
                                 x ← x - γ (∇²₂₁G v + ∇₂F)
    T times                      z ← z - ρ ∇₁G_i(z, x)      at the new x

In expectation v is the Neumann series of K terms, for (K - 1) / 2 Hessian products on average.
Published steps: ρ, γ ∝ t^-1/2.

References:
    S. Ghadimi, M. Wang. Approximation methods for bilevel programming. arXiv 1802.02246, 2018,
    Algorithm 3 (BSA).
"""

from __future__ import annotations

from typing import Unpack

import optax

from bilevel_flax import per_sample as rows
from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import nested, report_at
from bilevel_flax.solvers.nested.linear_solves import randomised_hypergradient
from bilevel_flax.solvers.nested.sampled_oracles import (
    SampledOracles,
    first,
    split,
)
from bilevel_flax.solvers.step import optimizer_step


@takes(Common)
def bsa(
    problem: Problem,
    *,
    adjoint_step: float | optax.Schedule,
    inner_steps: int = 10,
    adjoint_steps: int = 10,
    **common: Unpack[Common],
) -> BilevelSolver:
    """BSA: randomised v, one outer step, T inner steps; T + 2 + (K - 1) / 2 units on average.

    Args:
        problem: the bilevel problem.
        adjoint_step: η, below 1 / (largest eigenvalue of ∇²₁₁G); a schedule counts updates.
        inner_steps: T, at least 1.
        adjoint_steps: K, the terms of the series, at least 1. `info.oracle_units` has the p that
            was drawn.
        **common: optimisers and weights, see `solvers.keywords`; `outer` is no row-sparse
            one.

    Returns:
        A solver with `batches` (K + T, 1).

    Raises:
        ValueError: a number of steps or a step size out of range, weights that are no shares.

    Example:
        >>> import optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> rate = optax.polynomial_schedule(0.5, 0.01, power=1, transition_steps=1000)
        >>> steps = {"inner": optax.sgd(rate), "outer": optax.sgd(rate), "adjoint_step": 0.5}
        >>> solver = bf.contrib.bsa(problem, **steps)
        >>> solver.batches, solver.units
        ((20, 1), 16.5)
    """
    check_count("inner_steps", inner_steps)
    check_count("adjoint_steps", adjoint_steps)
    check_positive("adjoint_step", adjoint_step)

    def step(sampled: SampledOracles, state, inner, outer):
        z, _, x = state.variables
        system, cross, descent = split(inner, adjoint_steps - 1, 1, inner_steps)
        minibatches = system, first(cross), first(outer)
        estimate, factors = randomised_hypergradient(
            sampled, state, z, x, minibatches, adjoint_step, adjoint_steps
        )
        d_x = rows.densify(estimate.d_x, x)
        x, outer_opt_state = optimizer_step(sampled.transforms.outer, d_x, state.outer_opt_state, x)
        sampled = sampled.after(estimate.outer.out[1])
        z, inner_opt_state, inner_out, norms = sampled.inner_sgd(
            z, state.inner_opt_state, x, descent
        )
        state = state.replace(
            inner_params=z,
            adjoint=estimate.adjoint,
            outer_params=x,
            inner_opt_state=inner_opt_state,
            outer_opt_state=outer_opt_state,
        )
        units = inner_steps + 2 + factors
        report = report_at(inner_out, estimate, norms, d_x, units)
        return state, report._replace(inner_last=True)

    return nested(
        problem,
        step,
        name="bsa",
        batches=(adjoint_steps + inner_steps, 1),
        units=inner_steps + 2 + (adjoint_steps - 1) / 2,
        moves_outer=True,
        **common,
    )
