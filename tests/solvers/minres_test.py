"""MINRES against dense algebra, on systems with and without a solution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transcriptions import textbook_cg

from bilevel_flax.solvers.nested.minres import minres, ritz_values

pytestmark = pytest.mark.usefixtures("x64")
SIZE = 24


@functools.partial(jax.jit, static_argnums=2)
def solve(matrix, target, iterations, tolerance):
    one = lambda a, b: minres(lambda v: a @ v, b, iterations, tolerance)
    return jax.vmap(one)(matrix, target)


def systems(kind: str, condition: float, count: int = 30):
    """Matrices, right-hand sides and their shortest least-squares solutions, by eigenvectors."""
    rng = np.random.default_rng(0)
    rank = {"definite": SIZE, "few": 4}.get(kind, SIZE // 2)
    matrices, targets, solutions = [], [], []
    for _ in range(count):
        basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
        within, beside = basis[:, :rank], basis[:, rank:]
        values = np.geomspace(1, 1 / condition, rank)
        if kind == "indefinite":
            values = values * rng.choice([-1, 1], rank)
        target = rng.normal(size=SIZE)
        if kind == "solvable":
            target = within @ (within.T @ target)
        if kind == "nearly":
            target -= (1 - 1e-4) * beside @ (beside.T @ target)
        matrices.append((within * values) @ within.T)
        targets.append(target)
        solutions.append((within / values) @ (within.T @ target))
    return np.array(matrices), np.array(targets), np.array(solutions)


def errors(ours, exact):
    return np.linalg.norm(ours - exact, axis=1) / np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize(
    ("kind", "singular"),
    [
        ("definite", False),
        ("solvable", False),
        ("few", True),
        ("semidefinite", True),
        ("indefinite", True),
        ("nearly", True),
    ],
)
def test_the_shortest_least_squares_solution(kind: str, singular: bool):
    for condition in (10.0, 1e3):
        matrices, targets, exact = systems(kind, condition)
        solution = solve(matrices, targets, 100, 1e-13)
        assert errors(solution.vector, exact).max() < (1e-4 if singular else 1e-9)
        assert errors(solution.conjugate, exact).max() < (1e-4 if singular else 1e-9)
        assert bool((solution.singular == singular).all())
    # In float32 no better than the products are, but never without bound.
    matrices, targets, exact = systems(kind, 10.0)
    args = (jnp.asarray(matrices, jnp.float32), jnp.asarray(targets, jnp.float32))
    assert errors(solve(*args, 100, 1e-6).vector, exact).max() < 0.03


def test_a_short_run_is_what_conjugate_gradients_and_the_krylov_space_give():
    matrices, targets, _ = systems("definite", 10.0)
    solution = solve(matrices, targets, 4, 0.0)
    for i, (matrix, target) in enumerate(zip(matrices, targets, strict=True)):
        expected = textbook_cg(matrix, target, 4)
        np.testing.assert_allclose(solution.conjugate[i], expected, rtol=1e-9, atol=1e-11)
        basis = np.linalg.qr(
            np.stack([np.linalg.matrix_power(matrix, k) @ target for k in range(4)], 1)
        )[0]
        best = basis @ np.linalg.lstsq(matrix @ basis, target)[0]
        np.testing.assert_allclose(solution.vector[i], best, rtol=1e-8, atol=1e-10)


def test_it_sees_the_curvature():
    matrices, targets, _ = systems("indefinite", 10.0)
    every = solve(matrices, targets, 100, 1e-13)
    seen = ritz_values(jax.tree.map(lambda leaf: leaf[0], every))
    np.testing.assert_allclose(seen[[0, -1]], np.linalg.eigvalsh(matrices[0])[[0, -1]], rtol=1e-8)


def test_the_scale_of_the_system_is_no_matter():
    matrices, targets, exact = systems("semidefinite", 100.0)
    for a, b in ((1e-12, 1e9), (1e12, 1e-9)):
        solution = solve(a * matrices, b * targets, 100, 1e-13)
        assert errors(solution.vector, exact * b / a).max() < 1e-4
    nothing = solve(matrices, 0 * targets, 100, 1e-13)
    assert not np.any(nothing.vector) and not np.any(nothing.iterations)
