"""SOBA: stochastic bilevel algorithm. SGD on z, v and x at once.

At (z, v, x), on one inner minibatch i and one outer minibatch j,

    D_z = ∇₁G_i        D_v = ∇²₁₁G_i v + ∇₁F_j        D_x = ∇²₂₁G_i v + ∇₂F_j

and the three variables move together. Published steps: ρ, γ ∝ t^-1/2 (inf of E‖∇h‖² is
O(log T · T^-1/2)).

Check: with G = ½‖z - x‖² and unit steps on z and v, z and v are x and -∇₁F one step late, and
this is SGD on F with a delay of two steps: x_{t+1} = x_t - γ (∇₁F_{t-1}(x_{t-2}) + ∇₂F_t).

References:
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms. NeurIPS 2022, Algorithm 2.
"""

from __future__ import annotations

from typing import Unpack

from bilevel_flax.base import BilevelSolver, Estimate, Estimator, Problem
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.single_loop import single_loop


def estimator() -> Estimator:
    """The minibatch directions themselves; no memory."""

    def update(oracle, variables, batch, state):
        del batch
        evaluation = oracle.directions(variables)
        return Estimate(evaluation.directions, state, evaluation)

    return Estimator(init=lambda variables: (), update=update)


@takes(CommonWithAdjoint)
def soba(problem: Problem, **common: Unpack[CommonWithAdjoint]) -> BilevelSolver:
    """SOBA with an Optax optimiser for each variable (4 gradient units a step).

    Args:
        problem: the bilevel problem.
        **common: optimisers and weights, see `solvers.keywords`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.soba(problem, inner=optax.sgd(0.5), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.zeros(3), jnp.ones(3))
        >>> update = jax.jit(solver.update)
        >>> for _ in range(100):
        ...     state, info = update(state, bf.Batch(jnp.ones(3), jnp.full(3, 5.0)))
        >>> [round(float(value), 2) for value in state.outer_params]
        [5.0, 5.0, 5.0]
    """
    return single_loop(problem, estimator(), name="soba", **common)
