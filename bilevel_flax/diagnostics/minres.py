"""MINRES: solves a symmetric system that may be indefinite, and sees the curvature on its way.

In exact arithmetic and with a positive definite matrix it walks through the Krylov spaces that
conjugate gradients walk through, and in each takes the vector with the smallest residual. Unlike
them it does not break down where the matrix has negative eigenvalues, as the Hessian of a deep
network usually does, and its residual never grows.

References:
    C. C. Paige, M. A. Saunders. Solution of sparse indefinite systems of linear equations. SIAM
    Journal on Numerical Analysis 12(4), 1975.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Solution(NamedTuple):
    """What `minres` found.

    Attributes:
        vector: [p].
        iterations: int32, products with the matrix.
        diagonal: [max_iterations], of the Lanczos matrix; entries from `iterations` on are 0.
        off_diagonal: the same, below the diagonal.
    """

    vector: jax.Array
    iterations: jax.Array
    diagonal: jax.Array
    off_diagonal: jax.Array


class _Carry(NamedTuple):
    """The recurrences' last values; Paige and Saunders' letters."""

    k: jax.Array
    x: jax.Array
    before: jax.Array  # the last two Lanczos vectors, not normalised
    last: jax.Array
    w: jax.Array  # the last two search directions
    w_before: jax.Array
    beta: jax.Array
    beta_before: jax.Array
    phi_bar: jax.Array  # norm of the residual
    delta_bar: jax.Array
    epsilon: jax.Array
    cos: jax.Array
    sin: jax.Array
    diagonal: jax.Array
    off_diagonal: jax.Array


def minres(
    product: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    max_iterations: int,
    tolerance: float | jax.Array,
) -> Solution:
    """Minimises ‖A v - b‖ over growing Krylov spaces, from v = 0.

    Args:
        product: `v -> A v`, A symmetric.
        target: b, float [p].
        max_iterations: products at most.
        tolerance: stops at ‖A v - b‖ <= tolerance · ‖b‖.
    """
    size = jnp.linalg.norm(target)
    zero, scalar = jnp.zeros_like(target), jnp.zeros_like(size)
    recorded = jnp.zeros(max_iterations, target.dtype)
    start = _Carry(
        k=jnp.int32(0),
        x=zero,
        before=zero,
        last=target,
        w=zero,
        w_before=zero,
        beta=size,
        beta_before=jnp.ones_like(size),
        phi_bar=size,
        delta_bar=scalar,
        epsilon=scalar,
        cos=-jnp.ones_like(size),
        sin=scalar,
        diagonal=recorded,
        off_diagonal=recorded,
    )

    def unfinished(c: _Carry):
        # β = 0: the Krylov space is exhausted, and what is left of the residual stays.
        return (c.k < max_iterations) & (c.phi_bar > tolerance * size) & (c.beta > 0)

    def step(c: _Carry) -> _Carry:
        v = c.last / c.beta
        y = product(v)
        y = y - jnp.where(c.k > 0, c.beta / c.beta_before, 0.0) * c.before
        alpha = jnp.vdot(v, y)
        y = y - (alpha / c.beta) * c.last
        beta = jnp.linalg.norm(y)
        # Rounding leaves a rest where the space is exhausted; it has no direction.
        scale = jnp.abs(alpha) + c.beta
        beta = jnp.where(beta > 10 * jnp.finfo(y.dtype).eps * scale, beta, 0.0)

        delta = c.cos * c.delta_bar + c.sin * alpha
        gamma_bar = c.sin * c.delta_bar - c.cos * alpha
        gamma = jnp.hypot(gamma_bar, beta)
        # Nothing left of the system but an equation without a solution: 0 · w = φ.
        solvable = gamma > 10 * jnp.finfo(y.dtype).eps * scale
        gamma = jnp.where(solvable, gamma, 1.0)
        cos = jnp.where(solvable, gamma_bar / gamma, 0.0)
        sin = jnp.where(solvable, beta / gamma, 1.0)
        w = (v - c.epsilon * c.w_before - delta * c.w) / gamma
        return _Carry(
            k=c.k + 1,
            x=c.x + (cos * c.phi_bar) * w,
            before=c.last,
            last=y,
            w=w,
            w_before=c.w,
            beta=beta,
            beta_before=c.beta,
            phi_bar=sin * c.phi_bar,
            delta_bar=-c.cos * beta,
            epsilon=c.sin * beta,
            cos=cos,
            sin=sin,
            diagonal=c.diagonal.at[c.k].set(alpha),
            off_diagonal=c.off_diagonal.at[c.k].set(beta),
        )

    end = jax.lax.while_loop(unfinished, step, start)
    return Solution(end.x, end.k, end.diagonal, end.off_diagonal)


def ritz_values(solution: Solution) -> np.ndarray:
    """Eigenvalues of A as the Krylov space sees them, ascending; the outer ones are the best."""
    k = int(solution.iterations)
    diagonal = np.asarray(solution.diagonal, np.float64)[:k]
    beside = np.asarray(solution.off_diagonal, np.float64)[: max(k - 1, 0)]
    return np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
