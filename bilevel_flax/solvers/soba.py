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

from typing import Any

import jax
import optax

from bilevel_flax import per_sample as rows
from bilevel_flax.base import BilevelSolver, Estimator, Problem, Variables
from bilevel_flax.oracles import Oracles
from bilevel_flax.solvers.single_loop import single_loop


def directions(found: Oracles) -> Variables:
    """(D_z, D_v, D_x) from the five quantities."""
    adjoint = jax.tree.map(lambda hv, grad: hv + grad, found.hvp, found.outer_grad_inner)
    outer = rows.add(found.cross_jvp, found.outer_grad_outer)
    return Variables(found.inner_grad, adjoint, outer)


def estimator() -> Estimator:
    """The minibatch directions themselves; no memory."""

    def update(oracle, variables, batch, state):
        del batch
        found = oracle(variables, combine=directions)
        return found.directions, state, found

    return Estimator(init=lambda variables: (), update=update)


def soba(
    problem: Problem,
    *,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    adjoint: optax.GradientTransformation | None = None,
    inner_weights: Any = None,
    outer_weights: Any = None,
) -> BilevelSolver:
    """SOBA with an Optax optimiser for each variable (4 gradient units a step).

    Args: as `single_loop`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.soba(problem, inner=optax.sgd(0.5), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.zeros(3), jnp.ones(3))
        >>> for _ in range(100):
        ...     state, info = solver.update(state, bf.Batch(jnp.ones(3), jnp.full(3, 5.0)))
        >>> [round(float(value), 2) for value in state.outer_params]
        [5.0, 5.0, 5.0]
    """
    return single_loop(
        problem,
        estimator(),
        inner=inner,
        outer=outer,
        adjoint=adjoint,
        inner_weights=inner_weights,
        outer_weights=outer_weights,
        name="soba",
    )
