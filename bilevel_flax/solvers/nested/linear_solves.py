"""Approximations of v = -[∇²₁₁G]⁻¹ ∇₁F that start anew in every update.

Each is made by a function that returns `solve(hvp, ∇₁F, samples) -> v`, with `hvp(u, sample)` the
Hessian product at the point in question.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax.base import PyTree, TrainState
from bilevel_flax.minibatches import scaled
from bilevel_flax.solvers.freezing import frozen_unless
from bilevel_flax.solvers.nested.sampled_oracles import (
    OuterGrads,
    Pieces,
    Sample,
    at_step,
    axpy,
    scan,
    vdot,
)


class Hypergradient(NamedTuple):
    """An approximate implicit gradient at one point."""

    adjoint: PyTree
    hvp: PyTree
    d_x: PyTree
    outer: OuterGrads


def hypergradient(
    pieces: Pieces, z, x, system: Sample, cross: Sample, outer: Sample, solve, after=None
) -> Hypergradient:
    """D_x with v = solve(hvp, ∇₁F, system)."""
    grads = pieces.outer_grads(z, x, outer, after)
    v = solve(lambda u, sample: pieces.hvp(z, u, x, sample), grads.inner, system)
    product, d_x = pieces.direction(z, v, x, cross, grads)
    return Hypergradient(v, product, d_x, grads)


def neumann(step: Any, times: int | None = None):
    """V = -η Σ_{k=0..Q} Π_{j≤k}(I - ηH_j) ∇₁F, a Sample for each of the Q factors.

    With `times` = Q all factors share one Sample.
    """

    def solve(hvp, grad, samples: Sample):
        def body(carry, sample):
            term, total = carry
            term = axpy(-step, hvp(term, sample), term)
            return (term, axpy(1.0, term, total)), None

        (_, total), _ = scan(body, (grad, grad), samples, times)
        return scaled(total, -step)

    return solve


def randomised_neumann(step: Any, count: int, factors: jax.Array):
    """V = -Kη Π_{j≤p}(I - ηH_j) ∇₁F, K = `count`, p = `factors` <= K - 1 of the Samples used.

    With p uniform in {0 .. K-1} its expectation is the Neumann series of K terms. The products
    that p leaves out are not computed.
    """

    def solve(hvp, grad, samples: Sample):
        def body(k, term):
            sample = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, k, keepdims=False), samples
            )
            return axpy(-step, hvp(term, sample), term)

        # Without a factor there is no Sample to index, not even at trace time.
        term = jax.lax.fori_loop(0, factors, body, grad) if count > 1 else grad
        return scaled(term, -count * step)

    return solve


def randomised_hypergradient(
    pieces: Pieces, state: TrainState, z, x, samples, step: Any, count: int, after=None
) -> tuple[Hypergradient, jax.Array]:
    """BSA's and TTSA's D_x with the randomised series of `count` terms, and the p that was drawn.

    Args:
        pieces: of the update.
        state: before the update; its rng and step draw p.
        z: where.
        x: where.
        samples: (system, cross, outer), as for `hypergradient`.
        step: η, or a schedule of it.
        count: K.
        after: as for `hypergradient`.
    """
    factors = draw_factors(state.rng, state.step, count)
    solve = randomised_neumann(at_step(step, state.step), count, factors)
    system, cross, outer = samples
    return hypergradient(pieces, z, x, system, cross, outer, solve, after), factors


def check_damping(value: Any) -> None:
    """Raises unless `value` is a finite number of at least 0.

    Raises:
        ValueError: names the value.
    """
    if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"damping must be a finite number >= 0, got {value!r}")


def conjugate_gradients(steps: int, damping: float):
    """(H + δI) v = -∇₁F from v = 0 by `steps` iterations on one Sample.

    It stops early where a direction has no positive curvature.
    """

    def solve(hvp, grad, sample: Sample):
        residue = jax.tree.map(jnp.negative, grad)

        def body(carry, _):
            v, residue, direction, square = carry
            product = axpy(damping, direction, hvp(direction, sample))
            curvature = vdot(direction, product)
            # Written so that a NaN goes on and shows.
            goes_on = ~(curvature <= 0)
            length = square / jnp.where(goes_on, curvature, 1.0)
            after = axpy(-length, product, residue)
            new_square = vdot(after, after)
            ratio = new_square / jnp.where(square > 0, square, 1.0)
            new = (axpy(length, direction, v), after, axpy(ratio, direction, after), new_square)
            return frozen_unless(goes_on, new, carry), None

        zero = jax.tree.map(jnp.zeros_like, grad)
        start = (zero, residue, residue, vdot(residue, residue))
        (v, *_), _ = jax.lax.scan(body, start, length=steps)
        return v

    return solve


def draw_factors(rng: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """The randomised Neumann's p at an update: int32, uniform in {0 .. count - 1}."""
    # 0 and 1 are the losses' keys.
    key = jax.random.fold_in(jax.random.fold_in(rng, 2), step)
    return jax.random.randint(key, (), 0, count)
