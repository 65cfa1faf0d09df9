"""Approximations of v = -[∇²₁₁G]⁻¹ ∇₁F that start anew in every update.

Each is made by a function that returns `solve(hvp, ∇₁F, minibatches) -> (v, metrics)`, with
`hvp(u, minibatch)` the Hessian product at the point in question.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax import tree
from bilevel_flax.base import Metrics, Problem, PyTree, TrainState
from bilevel_flax.base.condition import is_condition
from bilevel_flax.minibatches import scale
from bilevel_flax.solvers.nested.minres import minres
from bilevel_flax.solvers.nested.sampled_oracles import (
    Minibatch,
    OuterGrads,
    SampledOracles,
    at_step,
    axpy,
    scan,
)

_SOLVED = 0.1  # residual of GMRES, relative to that of v = 0


class Hypergradient(NamedTuple):
    """An approximate implicit gradient at one point."""

    adjoint: PyTree
    hvp: PyTree
    d_x: PyTree
    outer: OuterGrads
    metrics: Metrics = {}  # the linear solver's


def hypergradient(
    sampled: SampledOracles,
    z,
    x,
    system: Minibatch,
    cross: Minibatch,
    outer: Minibatch,
    solve,
    after=None,
) -> Hypergradient:
    """D_x with v = solve(hvp, ∇₁F, system)."""
    grads = sampled.outer_grads(z, x, outer, after)
    v, metrics = solve(lambda u, minibatch: sampled.hvp(z, u, x, minibatch), grads.inner, system)
    product, d_x = sampled.direction(z, v, x, cross, grads)
    return Hypergradient(v, product, d_x, grads, metrics)


def neumann(step: Any, times: int | None = None):
    """V = -η Σ_{k=0..Q} Π_{j≤k}(I - ηH_j) ∇₁F, a Minibatch for each of the Q factors.

    With `times` = Q all factors share one Minibatch.
    """

    def solve(hvp, grad, minibatches: Minibatch):
        def body(carry, minibatch):
            term, total = carry
            term = axpy(-step, hvp(term, minibatch), term)
            return (term, axpy(1.0, term, total)), None

        (_, total), _ = scan(body, (grad, grad), minibatches, times)
        return scale(total, -step), {}

    return solve


def randomised_neumann(step: Any, count: int, factors: jax.Array):
    """V = -Kη Π_{j≤p}(I - ηH_j) ∇₁F, K = `count`, p = `factors` <= K - 1 of the Minibatches used.

    With p uniform in {0 .. K-1} its expectation is the Neumann series of K terms. The products
    that p leaves out are not computed.
    """

    def solve(hvp, grad, minibatches: Minibatch):
        def body(k, term):
            minibatch = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, k, keepdims=False), minibatches
            )
            return axpy(-step, hvp(term, minibatch), term)

        # Without a factor there is no Minibatch to index, not even at trace time.
        term = jax.lax.fori_loop(0, factors, body, grad) if count > 1 else grad
        return scale(term, -count * step), {}

    return solve


def randomised_hypergradient(
    sampled: SampledOracles, state: TrainState, z, x, minibatches, step: Any, count: int, after=None
) -> tuple[Hypergradient, jax.Array]:
    """BSA's and TTSA's D_x with the randomised series of `count` terms, and the p that was drawn.

    Args:
        sampled: of the update.
        state: before the update; its rng and step draw p.
        z: where.
        x: where.
        minibatches: (system, cross, outer), as for `hypergradient`.
        step: η, or a schedule of it.
        count: K.
        after: as for `hypergradient`.
    """
    factors = draw_factors(state.rng, state.step, count)
    solve = randomised_neumann(at_step(step, state.step), count, factors)
    system, cross, outer = minibatches
    return hypergradient(sampled, z, x, system, cross, outer, solve, after), factors


def check_damping(value: Any) -> None:
    """Raises unless `value` is a finite number of at least 0.

    Raises:
        ValueError: names the value.
    """
    if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"damping must be a finite number >= 0, got {value!r}")


def conjugate_gradients(steps: int, damping: float):
    """(H + δI) v = -∇₁F from v = 0 by at most `steps` iterations on one Minibatch.

    Where a direction has no positive curvature, or the residual outgrows that of v = 0, v is the
    vector with the smallest residual that the same products give (MINRES); where there is no
    solution, the shortest least-squares solution.
    """

    def solve(hvp, grad, minibatch: Minibatch):
        product, target, complete = _system(hvp, grad, minibatch, damping)
        eps = min(float(jnp.finfo(leaf.dtype).eps) for leaf in target)
        solution = minres(product, target, steps, tolerance=eps)
        singular = solution.singular.astype(jnp.float32)
        return complete(solution.conjugate), {"adjoint_singular": singular}

    return solve


def gmres(steps: int, damping: float):
    """(Jᵀ + δI) v = -∇₁F for a J that need not be symmetric, from v = 0 by `steps` products.

    GMRES: the vector with the smallest residual in the Krylov space, which is kept (`steps` + 1
    copies of z). `info.metrics["adjoint_unsolved"]` is 1 where that residual is above a tenth of
    ‖∇₁F‖ (or no number): more steps, or a damping, are needed.
    """

    def solve(hvp, grad, minibatch: Minibatch):
        product, target, complete = _system(hvp, grad, minibatch, damping)
        eps = min(float(jnp.finfo(leaf.dtype).eps) for leaf in target)
        v, _ = jax.scipy.sparse.linalg.gmres(
            product, target, tol=eps, restart=steps, maxiter=1, solve_method="incremental"
        )
        rest = tree.norm(jax.tree.map(jnp.subtract, product(v), target))
        solved = rest <= _SOLVED * tree.norm(target)
        return complete(v), {"adjoint_unsolved": 1.0 - solved.astype(jnp.float32)}

    return solve


def krylov(problem: Problem, steps: int, damping: float):
    """Conjugate gradients, or GMRES where the inner problem is a condition."""
    return (gmres if is_condition(problem.inner_loss) else conjugate_gradients)(steps, damping)


def _system(hvp, grad, minibatch: Minibatch, damping: float):
    """(v -> (H + δI) v, -∇₁F, way back to a tree like z); lists of leaves in float32 at least."""
    floats = tree.split(grad)

    def in_own_dtypes(leaves):
        own = zip(leaves, floats.leaves, strict=True)
        return floats.complete([u.astype(leaf.dtype) for u, leaf in own])

    def product(leaves):
        image = tree.split(hvp(in_own_dtypes(leaves), minibatch)).leaves
        return [
            a.astype(u.dtype) + jnp.asarray(damping, u.dtype) * u
            for a, u in zip(image, leaves, strict=True)
        ]

    target = [-leaf.astype(tree.wide(leaf.dtype)) for leaf in floats.leaves]
    return product, target, in_own_dtypes


def draw_factors(rng: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """The randomised Neumann's p at an update: int32, uniform in {0 .. count - 1}."""
    # 0 and 1 are the losses' keys.
    key = jax.random.fold_in(jax.random.fold_in(rng, 2), step)
    return jax.random.randint(key, (), 0, count)
