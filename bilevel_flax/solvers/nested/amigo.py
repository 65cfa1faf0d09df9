"""AmIGO: amortised implicit gradient optimisation. Two warm-started loops, then a step of x.

    T times      z ← z - ρ ∇₁G_i(z, x)
    S times      v ← v - ρ (∇²₁₁G_i v + ∇₁F_j)      with ∇₁F_j(z, x) held fixed
    then         x ← x - γ (∇²₂₁G_i v + ∇₂F_j)

with a fresh inner minibatch i for every product and one outer minibatch j. Both loops start where
they ended in the update before; steps are constant.

References:
    M. Arbel, J. Mairal. Amortized implicit differentiation for stochastic bilevel optimization.
    ICLR 2022, Algorithm 1.
"""

from __future__ import annotations

from typing import Unpack

import jax

from bilevel_flax import checks
from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.checks import check_count
from bilevel_flax.solvers.adjoint_optimisers import like_inner_optimizer
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.nested.frame import nested, report_at
from bilevel_flax.solvers.nested.linear_solves import Hypergradient
from bilevel_flax.solvers.nested.sampled_oracles import (
    SampledOracles,
    axpy,
    first,
    split,
)
from bilevel_flax.solvers.step import optimizer_step
from bilevel_flax.tree import filter_inexact, norm, ratio


@takes(CommonWithAdjoint)
def amigo(
    problem: Problem,
    *,
    inner_steps: int = 10,
    adjoint_steps: int = 10,
    **common: Unpack[CommonWithAdjoint],
) -> BilevelSolver:
    """AmIGO: T inner steps, S adjoint steps, one outer step; T + S + 2 gradient units.

    Args:
        problem: the bilevel problem.
        inner_steps: T, steps of z in one update.
        adjoint_steps: S, steps of v in one update.
        **common: optimisers and weights, see `solvers.keywords`.

    Returns:
        A solver with `batches` (T + S + 1, 1).

    Raises:
        ValueError: a number of steps below 1, weights that are no shares.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.amigo(problem, inner=optax.sgd(0.5), outer=optax.sgd(0.5))
        >>> state = solver.init(jnp.zeros(3), jnp.ones(3))
        >>> inner, outer = solver.batches
        >>> batch = bf.Batch(jnp.ones((inner, 3)), jnp.full((outer, 3), 5.0))
        >>> update = jax.jit(solver.update)
        >>> for _ in range(40):
        ...     state, info = update(state, batch)
        >>> [round(float(value), 2) for value in state.outer_params]
        [5.0, 5.0, 5.0]
    """
    check_count("inner_steps", inner_steps)
    check_count("adjoint_steps", adjoint_steps)

    if common.get("adjoint") is None:
        inner = checks.optimizer("inner", common.get("inner"))
        common["adjoint"] = like_inner_optimizer(inner, decays=False)

    def step(sampled: SampledOracles, state, inner, outer):
        z, v, x = state.variables
        descent, system, cross = split(inner, inner_steps, adjoint_steps, 1)
        z, inner_opt_state, inner_out, norms = sampled.inner_sgd(
            z, state.inner_opt_state, x, descent
        )
        grads = sampled.outer_grads(z, x, first(outer), inner_out[1])

        length = norm(grads.inner)

        def body(carry, minibatch):
            v, opt_state = carry
            d_v = axpy(1.0, sampled.hvp(z, v, x, minibatch), grads.inner)
            carry = optimizer_step(
                sampled.transforms.adjoint,
                d_v,
                opt_state,
                v,
                inner_opt_state=inner_opt_state,
                inner_params=filter_inexact(z),
                adjoint_residual=ratio(norm(d_v), length),
                value=inner_out[0],
                grad=filter_inexact(d_v),
                outer_params=x,
            )
            return carry, None

        (v, adjoint_opt_state), _ = jax.lax.scan(body, (v, state.adjoint_opt_state), system)
        product, d_x = sampled.direction(z, v, x, first(cross), grads)
        state = state.replace(
            inner_params=z,
            adjoint=v,
            inner_opt_state=inner_opt_state,
            adjoint_opt_state=adjoint_opt_state,
        )
        return state, report_at(inner_out, Hypergradient(v, product, d_x, grads), norms)

    return nested(
        problem,
        step,
        name="amigo",
        batches=(inner_steps + adjoint_steps + 1, 1),
        units=inner_steps + adjoint_steps + 2,
        **common,
    )
