"""The adjoint that solves  ∇²₁₁G v = -∇₁F  on held minibatches, in three ways.

Systems are on flat vectors, of those leaves of z alone that move. The means over a side's
minibatches are scans, one minibatch at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel_flax import oracles
from bilevel_flax.base import PyTree
from bilevel_flax.solvers.nested import minres as krylov
from bilevel_flax.tree import is_inexact

_RESTART = 50  # vectors like z that GMRES keeps


def flat(tree: PyTree, moving: tuple[bool, ...]) -> jax.Array:
    """The leaves that move, as one vector."""
    chosen = [leaf for leaf, moves in zip(jax.tree.leaves(tree), moving, strict=True) if moves]
    return ravel_pytree(chosen)[0]


def unflat(vector: jax.Array, like: PyTree, moving: tuple[bool, ...]) -> PyTree:
    """The way back, in the dtypes of `like`; zeros for what does not move."""
    leaves, treedef = jax.tree.flatten(like)
    chosen = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
    new = iter(ravel_pytree(chosen)[1](vector))
    rest = [jnp.zeros_like(leaf) if is_inexact(leaf) else leaf for leaf in leaves]
    pairs = zip(rest, moving, strict=True)
    return treedef.unflatten([next(new) if moves else leaf for leaf, moves in pairs])


def mean_over(function, side, rng):
    """The mean of `function(minibatch, key)` over a side."""
    batches, weights = side

    def at(i, batch):
        return function(batch, None if rng is None else jax.random.fold_in(rng, i))

    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shapes = jax.eval_shape(at, jnp.int32(0), first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, one):
        i, batch, weight = one
        return jax.tree.map(
            lambda so_far, new: so_far + weight.astype(new.dtype) * new, total, at(i, batch)
        ), None

    total, _ = jax.lax.scan(add, zeros, (jnp.arange(len(weights)), batches, weights))
    return total


# By itself, and handed on: each program that holds it would compile it once more.
@functools.partial(jax.jit, static_argnums=0)
def outer_gradients(problem, point, outer, model_state, rng):
    """(∇₁F, ∇₂F), means over a side, with keys of F's own."""
    z, _, x = point

    def gradients(batch, key):
        return oracles.outer_grads(problem, z, x, batch, model_state, key)

    return mean_over(gradients, outer, None if rng is None else jax.random.fold_in(rng, 2**31 - 1))


def _system(problem, moving, point, inner, gradients, model_state, rng, diagonal):
    """(v -> (H + damping) v, -∇₁F), on flat vectors."""
    v = point.adjoint

    def product(vector):
        at = point._replace(adjoint=unflat(vector, v, moving))

        def one(batch, key):
            return flat(oracles.hvp(problem, at, batch, model_state, key), moving)

        return mean_over(one, inner, rng) + diagonal * vector

    return product, -flat(gradients[0], moving)


@functools.partial(jax.jit, static_argnums=(0, 1))
def dense_system(problem, moving, *held):
    """(rows H e_i, or Jᵀ e_i, of the matrix; -∇₁F)."""
    product, target = _system(problem, moving, *held)
    return jax.lax.map(product, jnp.eye(target.size, dtype=target.dtype)), target


def _start(point, moving, warm_start, target):
    return jnp.where(warm_start, flat(point.adjoint, moving), 0.0).astype(target.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def minres(problem, moving, max_iterations, *args):
    """(the solution, the recurrence's own record), for a symmetric H."""
    *held, warm_start, tolerance = args
    product, target = _system(problem, moving, *held)
    start = _start(held[0], moving, warm_start, target)
    rest = target - product(start)
    # The tolerance is relative to the target, wherever the start is.
    length = jnp.linalg.norm(rest)
    allowed = tolerance * jnp.linalg.norm(target) / jnp.where(length > 0, length, 1.0)
    solution = krylov.minres(product, rest, max_iterations, allowed)
    return start + solution.vector, solution


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def gmres(problem, moving, max_iterations, *args):
    """The solution, for any J."""
    *held, warm_start, tolerance = args
    product, target = _system(problem, moving, *held)
    start = _start(held[0], moving, warm_start, target)
    restart = min(_RESTART, max_iterations, target.size)
    return jax.scipy.sparse.linalg.gmres(
        product,
        target,
        start,
        tol=tolerance,
        restart=restart,
        maxiter=-(-max_iterations // restart),
        solve_method="incremental",
    )[0]


def solve_nonsymmetric(rows: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shortest least-squares solution, and the eigenvalues' real parts."""
    exact = rows.astype(np.float64)  # row i: Jᵀ e_i
    if not np.isfinite(exact).all():
        return np.full(len(exact), np.nan), np.full(len(exact), np.nan)
    rounding = max(len(exact), 30) * np.finfo(rows.dtype).eps
    solution = np.linalg.lstsq(exact.T, target.astype(np.float64), rcond=rounding)[0]
    return solution, np.sort(np.linalg.eigvals(exact).real)


def solve_symmetric(matrix: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shortest least-squares solution, and the eigenvalues."""
    exact = matrix.astype(np.float64)
    if not np.isfinite(exact).all():
        return np.full(len(exact), np.nan), np.full(len(exact), np.nan)
    values, vectors = np.linalg.eigh((exact + exact.T) / 2)
    # The products themselves are rounded, however few the parameters are.
    eps = max(len(values), 30) * np.finfo(matrix.dtype).eps
    real = np.abs(values) > eps * np.abs(values).max(initial=0.0)
    inverse = np.where(real, 1 / np.where(real, values, 1.0), 0.0)
    return vectors @ (inverse * (vectors.T @ target)), values
