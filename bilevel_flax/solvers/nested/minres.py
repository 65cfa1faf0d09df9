"""MINRES: solves a symmetric system that may be indefinite or singular, and sees its curvature.

Each step of Lanczos's recurrence adds a vector to a Krylov space, and two solutions come out of it:
the vector of the space with the smallest residual (MINRES), whose residual never grows, and the one
whose residual is orthogonal to the space, which is what conjugate gradients find. The second needs
positive curvature; the first exists always.

References:
    C. C. Paige, M. A. Saunders. Solution of sparse indefinite systems of linear equations. SIAM
    Journal on Numerical Analysis 12(4), 1975.
    Y. Liu, A. Milzarek, F. Roosta. Obtaining pseudo-inverse solutions with MINRES. arXiv
    2309.17096, 2023 (the shortest least-squares solution).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import PyTree
from bilevel_flax.tree import norm

# Curvature below this times machine precision times the largest that was seen is rounding.
_ROUNDING = 30
# Without a solution, rounding makes x grow without bound once ‖A r‖ is as small as it gets. It has
# passed that point when it has risen by this factor and ‖r‖ falls no more, or is rounding itself.
_RISE, _STILL = 20, 0.99


class Solution(NamedTuple):
    """What `minres` ends with.

    Attributes:
        vector: the smallest residual; where `singular`, the shortest of the least squares.
        conjugate: what conjugate gradients give, where all curvature met was positive and the
            residual is no larger than that of 0; else `vector`.
        iterations: int32, products with the matrix.
        singular: bool, the system has no solution as far as rounding allows to tell.
        diagonal: [max_iterations], of the Lanczos matrix; entries from `iterations` on are 0.
        off_diagonal: the same, below the diagonal.
    """

    vector: PyTree
    conjugate: PyTree
    iterations: jax.Array
    singular: jax.Array
    diagonal: jax.Array
    off_diagonal: jax.Array


class _Carry(NamedTuple):
    """The recurrences' last values; Paige and Saunders' letters."""

    k: jax.Array
    x: PyTree
    conjugate: PyTree
    residual: PyTree  # b - A x
    before: PyTree  # the last two Lanczos vectors, of length 1
    last: PyTree
    w: PyTree  # the last two search directions
    w_before: PyTree
    beta: jax.Array
    phi_bar: jax.Array  # norm of the residual
    delta_bar: jax.Array
    epsilon: jax.Array
    cos: jax.Array
    sin: jax.Array
    pivot: jax.Array  # of the Lanczos matrix; all positive where it is positive definite
    positive: jax.Array  # whether all have been
    largest: jax.Array  # curvature
    stationary: jax.Array  # A (b - A x) = 0: there is a least-squares solution, and no other
    best: PyTree  # the shortest least-squares solution, as far as is known
    best_slope: jax.Array  # ‖A r‖ there
    best_phi_bar: jax.Array  # ‖r‖ there
    flat: jax.Array  # whether ‖A r‖ / ‖r‖ has been next to nothing
    diagonal: jax.Array
    off_diagonal: jax.Array


def _dot(tree: PyTree, other: PyTree) -> jax.Array:
    products = jax.tree.leaves(jax.tree.map(jnp.vdot, tree, other))
    return sum(products, start=jnp.zeros((), jnp.float32))


def _sum(tree: PyTree, *terms: tuple[jax.Array, PyTree]) -> PyTree:
    """The tree plus factor · tree for each of the terms."""
    for factor, term in terms:
        tree = jax.tree.map(lambda a, b, s=factor: a + s.astype(a.dtype) * b, tree, term)
    return tree


def _scale(factor: jax.Array, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)


def _choose(flag: jax.Array, tree: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), tree, other)


def _shortest(x: PyTree, residual: PyTree) -> PyTree:
    """X without its part along the residual, which lies in A's null space if ‖r‖ is least."""
    length = _dot(residual, residual)
    excess = _dot(residual, x) / jnp.where(length > 0, length, 1.0)
    return _sum(x, (-excess, residual))


def minres(
    product: Callable[[PyTree], PyTree],
    target: PyTree,
    max_iterations: int,
    tolerance: float | jax.Array,
) -> Solution:
    """Minimises ‖A v - b‖ over growing Krylov spaces, from v = 0.

    Args:
        product: `v -> A v`, A symmetric.
        target: b, a tree of float leaves (float32 at least).
        max_iterations: products at most.
        tolerance: stops at ‖A v - b‖ <= tolerance · ‖b‖, and where no direction is left that
            reduces it.
    """
    size = norm(target)
    zero, scalar = jax.tree.map(jnp.zeros_like, target), jnp.zeros_like(size)
    eps = max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(target))
    recorded = jnp.zeros(max_iterations, size.dtype)
    start = _Carry(
        k=jnp.int32(0),
        x=zero,
        conjugate=zero,
        residual=target,
        before=zero,
        last=_scale(1 / jnp.where(size > 0, size, 1.0), target),
        w=zero,
        w_before=zero,
        beta=scalar,
        phi_bar=size,
        delta_bar=scalar,
        epsilon=scalar,
        cos=-jnp.ones_like(size),
        sin=scalar,
        pivot=jnp.ones_like(size),
        positive=jnp.bool_(True),
        largest=scalar,
        stationary=jnp.bool_(False),
        best=zero,
        best_slope=jnp.full_like(size, jnp.inf),
        best_phi_bar=size,
        flat=jnp.bool_(False),
        diagonal=recorded,
        off_diagonal=recorded,
    )

    def unfinished(c: _Carry):
        # β = 0: the Krylov space is exhausted.
        exhausted = (c.k > 0) & (c.beta == 0)
        # Written so that a NaN goes on and shows.
        solved = c.phi_bar <= tolerance * size
        return (c.k < max_iterations) & ~(solved | exhausted | c.stationary)

    def step(c: _Carry) -> _Carry:
        v = c.last
        y = _sum(product(v), (-c.beta, c.before))
        alpha = _dot(v, y)
        y = _sum(y, (-alpha, v))
        beta = norm(y)
        largest = jnp.maximum(c.largest, jnp.hypot(jnp.hypot(alpha, beta), c.beta))
        rounding = _ROUNDING * eps * largest
        # What rounding leaves where the space is exhausted has no direction.
        beta = jnp.where(beta <= rounding, 0.0, beta)

        delta = c.cos * c.delta_bar + c.sin * alpha
        gamma_bar = c.sin * c.delta_bar - c.cos * alpha
        relative_slope = jnp.hypot(gamma_bar, c.cos * beta)  # ‖A r‖ / ‖r‖ at x
        blur = eps * largest * norm(c.x)  # what rounding does to r
        slope = relative_slope * c.phi_bar + 0.01 * largest * blur
        better = slope < c.best_slope
        c = c._replace(
            best=_choose(better, _shortest(c.x, c.residual), c.best),
            best_slope=jnp.where(better, slope, c.best_slope),
            best_phi_bar=jnp.where(better, c.phi_bar, c.best_phi_bar),
            flat=c.flat | (relative_slope <= jnp.sqrt(eps) * largest),
        )
        still = (c.phi_bar > _STILL * c.best_phi_bar) | (blur > 0.1 * c.phi_bar)
        past = c.flat & still & (slope > _RISE * c.best_slope)
        stationary = (relative_slope <= rounding) | past
        gamma = jnp.where(stationary, 1.0, jnp.hypot(gamma_bar, beta))
        cos, sin = gamma_bar / gamma, beta / gamma
        direction = _sum(v, (-c.epsilon, c.w_before), (-delta, c.w))
        w = _scale(1 / gamma, direction)
        last = _scale(1 / jnp.where(beta > 0, beta, 1.0), y)
        phi_bar = sin * c.phi_bar

        pivot = alpha - c.beta**2 / c.pivot
        positive = c.positive & (pivot > rounding)
        along = c.phi_bar / jnp.where(positive, gamma_bar, 1.0)
        x = _sum(c.x, (cos * c.phi_bar, w))
        trusted = positive & (jnp.abs(along) * beta <= size)
        moved = c._replace(
            x=x,
            conjugate=_choose(trusted, _sum(c.x, (along, direction)), x),
            residual=_sum(_scale(sin**2, c.residual), (-cos * phi_bar, last)),
            before=v,
            last=last,
            w=w,
            w_before=c.w,
            beta=beta,
            phi_bar=phi_bar,
            delta_bar=-c.cos * beta,
            epsilon=c.sin * beta,
            cos=cos,
            sin=sin,
            pivot=jnp.where(positive, pivot, 1.0),
            positive=positive,
        )
        return _choose(stationary, c, moved)._replace(
            k=c.k + 1,
            largest=largest,
            stationary=stationary,
            diagonal=c.diagonal.at[c.k].set(alpha),
            off_diagonal=c.off_diagonal.at[c.k].set(beta),
        )

    end = jax.lax.while_loop(unfinished, step, start)
    return Solution(
        vector=_choose(end.stationary, end.best, end.x),
        conjugate=_choose(end.stationary, end.best, end.conjugate),
        iterations=end.k,
        singular=end.stationary,
        diagonal=end.diagonal,
        off_diagonal=end.off_diagonal,
    )


def ritz_values(solution: Solution) -> np.ndarray:
    """Eigenvalues of A as the Krylov space sees them, ascending; the outer ones are the best.

    NaN where A is not finite.
    """
    k = int(solution.iterations)
    diagonal = np.asarray(solution.diagonal, np.float64)[:k]
    beside = np.asarray(solution.off_diagonal, np.float64)[: max(k - 1, 0)]
    if not np.isfinite([*diagonal, *beside]).all():
        return np.full(k, np.nan)
    return np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
