"""Implicit differentiation: inner SGD, a linear system on one minibatch, a step of x.

    T times      z ← z - ρ ∇₁G_i(z, x)      on fresh minibatches i
    then         (∇²₁₁G_j + δI) v = -∇₁F     on one more minibatch j, approximately
    then         x ← x - γ (∇²₂₁G_j v + ∇₂F)

v starts from 0: at most S steps of conjugate gradients or of GMRES, or S products of the Neumann
series v = -η Σ_{k=0..S} (I - η(∇²₁₁G_j + δI))^k ∇₁F. GMRES is for systems that are not symmetric
(`Problem.from_condition`, with Jᵀ in the place of ∇²₁₁G).

Conjugate gradients need positive curvature. Where it ends, v is the vector with the smallest
residual in the same Krylov space (MINRES). Where the system has no solution (parameters that G does
not train, more of them than examples), v is the shortest least-squares solution, and
`info.metrics["adjoint_singular"]` is 1.

References:
    F. Pedregosa. Hyperparameter optimization with approximate gradient. ICML 2016 (CG).
    J. Lorraine, P. Vicol, D. Duvenaud. Optimizing millions of hyperparameters by implicit
    differentiation. AISTATS 2020 (Neumann).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import optax

from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.base.condition import is_condition
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import nested, report_at
from bilevel_flax.solvers.nested.linear_solves import (
    check_damping,
    conjugate_gradients,
    gmres,
    hypergradient,
    neumann,
)
from bilevel_flax.solvers.nested.sampled_oracles import SampledOracles, at_step, axpy, first, split

LINEAR_SOLVERS = ("cg", "gmres", "neumann")


def implicit_step(solve: Callable[[Any], Callable], inner_steps: int, *, same: bool = False):
    """The step of every method that solves its linear system on one minibatch.

    Args:
        solve: `solve(state) -> (hvp, ∇₁F, minibatch) -> v`.
        inner_steps: T.
        same: take the T inner steps on the minibatch of the system as well (K = 1).
    """

    def step(sampled: SampledOracles, state, inner, outer):
        z, _, x = state.variables
        if same:
            system = descent = first(inner)
        else:
            descent, system = split(inner, inner_steps, 1)
            system = first(system)
        z, opt_state, inner_out, norms = sampled.inner_sgd(
            z, state.inner_opt_state, x, descent, inner_steps if same else None
        )
        minibatches = system, system, first(outer)
        estimate = hypergradient(sampled, z, x, *minibatches, solve(state), inner_out[1])
        state = state.replace(inner_params=z, adjoint=estimate.adjoint, inner_opt_state=opt_state)
        return state, report_at(inner_out, estimate, norms)

    return step


@takes(Common)
def implicit(
    problem: Problem,
    *,
    linear_solver: str | None = None,
    adjoint_step: float | optax.Schedule | None = None,
    inner_steps: int = 10,
    adjoint_steps: int = 10,
    damping: float = 0.0,
    **common: Unpack[Common],
) -> BilevelSolver:
    """Implicit differentiation by CG, GMRES or Neumann; T + S + 2 gradient units.

    Args:
        problem: the bilevel problem.
        linear_solver: "cg", "gmres" (keeps S + 1 vectors like z) or "neumann"; None: "cg", and
            "gmres" where the inner problem is a condition.
        adjoint_step: η of the Neumann series, below 1 / (largest eigenvalue of ∇²₁₁G); None for
            the others.
        inner_steps: T, at least 1.
        adjoint_steps: S, Hessian products, at least 1.
        damping: δ, at least 0.
        **common: optimisers and weights, see `solvers.keywords`.

    Returns:
        A solver with `batches` (T + 1, 1).

    Raises:
        ValueError: an argument out of range, `adjoint_step` missing or without a use, "cg" for a
            condition.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.implicit(problem, inner=optax.sgd(1.0), outer=optax.sgd(1.0))
        >>> state = solver.init(jnp.zeros(3), jnp.ones(3))
        >>> batch = bf.Batch(jnp.zeros((11, 3)), jnp.full((1, 3), 5.0))
        >>> state, info = solver.update(state, batch)
        >>> state.outer_params.tolist(), float(info.adjoint_residual)
        ([5.0, 5.0, 5.0], 0.0)
    """
    check_count("inner_steps", inner_steps)
    check_count("adjoint_steps", adjoint_steps)
    check_damping(damping)
    nonsymmetric = is_condition(problem.inner_loss)
    if linear_solver is None:
        linear_solver = "gmres" if nonsymmetric else "cg"
    if linear_solver == "cg" and nonsymmetric:
        raise ValueError(
            'linear_solver="cg" needs a symmetric system, and a condition\'s need not be: take '
            '"gmres"'
        )
    if linear_solver not in LINEAR_SOLVERS:
        raise ValueError(
            f"linear_solver={linear_solver!r} is unknown; choose one of {LINEAR_SOLVERS}"
        )
    if linear_solver == "neumann":
        check_positive("adjoint_step", adjoint_step)
    elif adjoint_step is not None:
        raise ValueError(
            f'adjoint_step={adjoint_step!r} has no use with linear_solver="{linear_solver}": drop '
            "it"
        )

    def solve(state):
        if linear_solver != "neumann":
            method = gmres if linear_solver == "gmres" else conjugate_gradients
            return method(adjoint_steps, damping)
        series = neumann(at_step(adjoint_step, state.step), adjoint_steps)

        def on_one(hvp, grad, minibatch):
            damped = lambda u, minibatch: axpy(damping, u, hvp(u, minibatch))
            return series(damped, grad, minibatch)

        return on_one

    return nested(
        problem,
        implicit_step(solve, inner_steps),
        name=f"implicit_{linear_solver}",
        batches=(inner_steps + 1, 1),
        units=inner_steps + adjoint_steps + 2,
        **common,
    )
