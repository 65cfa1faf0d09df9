"""DARTS's two ways to move x: without an adjoint, and through one unrolled step of z.

First order: the inner problem's answer to x is left out,

    z -= ρ ∇₁G(z, x)        x -= γ ∇₂F(z, x)

which learns nothing about hyperparameters that F does not see. Second order: F after one step,

    z' = z - ρ ∇₁G(z, x)        x -= γ (∇₂F(z', x) - ρ ∇²₂₁G(z, x) ∇₁F(z', x))        z <- z'

that is, v = -ρ ∇₁F in place of v* = -H⁻¹ ∇₁F: the inverse Hessian is taken to be ρ. Both are biased
however small the steps; D_x is that of the fixed point z = z*(x) with this v.

A departure from the paper: z' is kept, where DARTS steps once more from z, on the x that has just
moved. The product with ∇²₂₁G is exact there; the paper's is a finite difference.

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
"""

from __future__ import annotations

from typing import Unpack

import jax.numpy as jnp

from bilevel_flax import checks
from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import StepReport, nested
from bilevel_flax.solvers.nested.sampled_oracles import SampledOracles, completed, first
from bilevel_flax.solvers.nested.unrolled import unrolled
from bilevel_flax.tree import norm


@takes(Common)
def darts1(problem: Problem, **common: Unpack[Common]) -> BilevelSolver:
    """First-order DARTS: x follows ∇₂F alone, at the same point as z (2 gradient units a step).

    Args:
        problem: the bilevel problem; its outer loss has to use every float leaf of x.
        **common: optimisers and weights, see `solvers.keywords`.

    Returns:
        A solver whose v stays 0 (its residual is 1).

    Raises:
        ValueError: weights that are no shares; at trace time a leaf of x that F never uses.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((x - batch) ** 2).sum() + z.sum(),
        ... )
        >>> solver = bf.contrib.darts1(problem, inner=optax.sgd(0.5), outer=optax.sgd(1.0))
        >>> state = solver.init(jnp.zeros(1), jnp.zeros(1))
        >>> state, info = solver.update(state, bf.Batch(jnp.zeros(1), jnp.full(1, 4.0)))
        >>> state.outer_params.tolist()  # that z follows x, and F grows with z, is not seen
        [4.0]
    """

    def step(sampled: SampledOracles, state, inner, outer):
        z, x = state.inner_params, state.outer_params
        last = first(outer)
        inner_out, d_z = sampled.inner_grad(z, x, first(inner))
        model_state = sampled.state_for_outer(inner_out[1])
        checks.outer_loss_sees_all(problem, state.variables, last.data, model_state, last.rng)
        grads = sampled.outer_grads(z, x, last, inner_out[1])
        args = state.inner_opt_state, x, first(inner), inner_out[0], d_z
        z, opt_state = sampled.inner_step(z, *args)
        state = state.replace(inner_params=z, inner_opt_state=opt_state)
        zero, one = jnp.float32(0.0), jnp.float32(1.0)
        d_x = completed(grads.outer, x)
        return state, StepReport(inner_out, grads.out, norm(d_z), zero, one, d_x)

    return nested(
        problem,
        step,
        name="darts1",
        batches=(1, 1),
        units=2,
        second_order=False,
        row_directions=False,
        **common,
    )


@takes(Common)
def darts2(problem: Problem, **common: Unpack[Common]) -> BilevelSolver:
    """Second-order DARTS: `unrolled` with one step of z's optimiser (4 gradient units a step).

    Args:
        problem: the bilevel problem.
        **common: optimisers and weights, see `solvers.keywords`; ρ is the learning rate of `inner`,
            and its momentum counts.

    Returns:
        A solver whose v stays 0 (its residual is 1).

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.contrib.darts2(problem, inner=optax.sgd(0.5), outer=optax.sgd(1.0))
        >>> state = solver.init(jnp.zeros(1), jnp.zeros(1))
        >>> state, info = solver.update(state, bf.Batch(jnp.zeros(1), jnp.full(1, 4.0)))
        >>> state.outer_params.tolist()  # dz'/dx = 1/2
        [2.0]
    """
    solver = unrolled(problem, inner_steps=1, **common)
    return solver._replace(method=solver.method._replace(name="darts2"))
