"""Full directions and the adjoint's residual against closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import finite_sums, logistic, quadratics

import bilevel_flax as bf
from bilevel_flax import data, diagnostics
from bilevel_flax.oracles import directions

pytestmark = pytest.mark.usefixtures("x64")


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


@pytest.fixture(params=[False, True], ids=["full", "ragged"])
def quadratic(request: pytest.FixtureRequest, x64: None) -> Any:
    return quadratics(ragged=request.param)


def test_full_oracles_give_the_full_directions(quadratic: Any):
    variables = quadratic.random_variables()
    found = diagnostics.full_oracles(quadratic.problem, variables, *finite_sums(quadratic))
    ours, exact = directions(found), quadratic.full_directions(variables)
    for mine, theirs in zip(ours, exact, strict=True):
        np.testing.assert_allclose(flat(mine), flat(theirs), rtol=1e-10, atol=1e-12)


def test_the_residual_is_zero_at_the_adjoint_and_one_at_zero(quadratic: Any):
    x = quadratic.outer_params
    exact = bf.Variables(quadratic.z_star(x), quadratic.v_star(x), x)
    sums = finite_sums(quadratic)
    residual = lambda v: diagnostics.adjoint_residual(
        quadratic.problem, exact._replace(adjoint=v), *sums
    )
    assert residual(exact.adjoint) < 1e-10
    assert residual(jax.tree.map(jnp.zeros_like, exact.adjoint)) == pytest.approx(1, abs=1e-12)
    # v = t v*: Hv + g = (1 - t) g.
    assert residual(jax.tree.map(lambda v: 0.25 * v, exact.adjoint)) == pytest.approx(0.75)


def test_the_residual_is_that_of_the_closed_form_anywhere(quadratic: Any):
    variables = quadratic.random_variables(5)
    zero = jax.tree.map(jnp.zeros_like, variables.adjoint)
    top = flat(quadratic.full_directions(variables).adjoint)
    bottom = flat(quadratic.full_directions(variables._replace(adjoint=zero)).adjoint)
    found = diagnostics.adjoint_residual(quadratic.problem, variables, *finite_sums(quadratic))
    assert found == pytest.approx(np.linalg.norm(top) / np.linalg.norm(bottom), rel=1e-10)


def test_a_declared_per_sample_leaf_gives_what_a_dense_one_gives():
    found = []
    for per_sample in (True, False):
        source = logistic(per_sample=per_sample)
        v = jax.tree.map(jnp.ones_like, source.inner_params)
        variables = bf.Variables(source.inner_params, v, source.outer_params)
        sums = finite_sums(source)
        full = diagnostics.full_oracles(source.problem, variables, *sums)
        residual = diagnostics.adjoint_residual(source.problem, variables, *sums)
        found.append((full.inner_grad, full.hvp, full.cross_jvp, residual))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *found)


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_the_held_minibatches_are_spread_and_whole(most: int):
    parts = data.partition({"a": np.arange(7.0)}, 2, shuffle=False)  # 4 minibatches, one padded
    held = data.subsample(parts, most)
    assert held.num_batches == len(held.weights) == min(most, 4)
    assert held.weights.sum() == pytest.approx(1)
    assert parts.ragged and held.ragged == (most >= 4)
    if most < 4:
        assert held.batches["mask"].min() == 1
        assert held.batches["index"][0, 0] == 0
    else:
        assert held is parts
