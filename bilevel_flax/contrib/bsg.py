"""BSG and BSGo: a stochastic gradient of h from one inner and one outer sample.

    g = -A_jᵀ h_i + ∇₂F_i,      h_i = ∇₁F_i(z),      A_j = [∇²₁₁G_j]⁻¹ ∇²₁₂G_j,      x ← x - α g

with z the minimiser of G_j itself (BSG) or of the full G (BSGo), Σα = ∞ and Σα² < ∞, e.g.
α₀ / (t + 1). Here z is approached by warm-started steps of the inner optimiser, on the minibatch j
alone (BSG) or on fresh minibatches (BSGo), and [∇²₁₁G_j]⁻¹ h_i by conjugate gradients. Samples on
which a hinge is flat have ∇²₂₁G_j = 0 and contribute nothing, so they need not be skipped.

When it is right: BSGo's g is unbiased only where ∇²₁₁G_j is the same for every j (the support
vector machine with ½‖ζ‖², where it is I). Otherwise E[A_j] is not [∇²₁₁G]⁻¹ ∇²₁₂G, and convergence
rests on the sufficient decrease E[g]ᵀ∇h ≥ μ‖∇h‖², which can fail. With z, x in R, F = z and
G_j = ½ a_j z² - b_j x z over (a, b) = (1/10, -1), (10, 5): E[g] = (-10 + ½) / 2 < 0 although
∇h = (-1 + 5) / 10.1 > 0, so that x runs uphill.

References:
    N. Couellan, W. Wang. Bi-level stochastic gradient for large scale support vector machine.
    Neurocomputing, 2015.
    N. Couellan, W. Wang. On the convergence of stochastic bi-level gradient methods. 2016.
"""

from __future__ import annotations

from typing import Unpack

from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.checks import check_count
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import nested
from bilevel_flax.solvers.nested.implicit import implicit_step
from bilevel_flax.solvers.nested.linear_solves import check_damping, krylov


def _solver(name, problem, inner_steps, adjoint_steps, damping, same, **settings) -> BilevelSolver:
    check_count("inner_steps", inner_steps)
    check_count("adjoint_steps", adjoint_steps)
    check_damping(damping)
    solve = krylov(problem, adjoint_steps, damping)
    return nested(
        problem,
        implicit_step(lambda state: solve, inner_steps, same=same),
        name=name,
        batches=(1, 1) if same else (inner_steps + 1, 1),
        units=inner_steps + adjoint_steps + 2,
        **settings,
    )


@takes(Common)
def bsg(
    problem: Problem,
    *,
    inner_steps: int = 10,
    adjoint_steps: int = 10,
    damping: float = 0.0,
    **common: Unpack[Common],
) -> BilevelSolver:
    """BSG: z minimises one minibatch's loss; T + S + 2 gradient units.

    Args:
        problem: the bilevel problem.
        inner_steps: T, at least 1.
        adjoint_steps: S, steps of conjugate gradients, at least 1.
        damping: added to the Hessian's diagonal, at least 0.
        **common: optimisers and weights, see `solvers.keywords`. `inner` steps T times on the same
            minibatch; the source's step of x is α₀ / (t + 1).

    Returns:
        A solver with `batches` (1, 1).

    Raises:
        ValueError: a number of steps below 1, a negative damping, weights that are no shares.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x - batch) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> rate = optax.sgd(lambda t: 1.0 / (t + 1))
        >>> solver = bf.contrib.bsg(problem, inner=optax.sgd(1.0), outer=rate)
        >>> state = solver.init(jnp.zeros(2), jnp.zeros(2))
        >>> state, info = solver.update(state, bf.Batch(jnp.ones(2), jnp.full(2, 3.0)))
        >>> state.outer_params.tolist()
        [2.0, 2.0]
    """
    return _solver("bsg", problem, inner_steps, adjoint_steps, damping, True, **common)


@takes(Common)
def bsgo(
    problem: Problem,
    *,
    inner_steps: int = 10,
    adjoint_steps: int = 10,
    damping: float = 0.0,
    **common: Unpack[Common],
) -> BilevelSolver:
    """BSGo: z minimises the full inner loss; T + S + 2 gradient units, `batches` (T + 1, 1).

    Args: as `bsg`; the inner optimiser's steps are taken on T fresh minibatches.

    Raises:
        ValueError: as `bsg`.

    Example:
        >>> import optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x - batch) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> bf.contrib.bsgo(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1)).batches
        (11, 1)
    """
    return _solver("bsgo", problem, inner_steps, adjoint_steps, damping, False, **common)
