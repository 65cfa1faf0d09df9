"""20 steps on every mesh equal those of one device, for every model and method; minutes."""

from __future__ import annotations

import functools
import warnings

import jax
import pytest
from sharding_problems import MESHES, MODELS, RULES, SOLVERS, Run, largest_difference, run

from bilevel_flax.plan.collectives import collectives

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*compares visits")]


@functools.cache
def alone(model: str, method: str) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return run(model, method, None)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("model", MODELS)
def test_steps_on_a_mesh_are_the_steps_of_one_device(model: str, method: str, mesh: str):
    many = run(model, method, mesh, rules=RULES[model] if "tensor" in mesh else None)
    assert largest_difference(alone(model, method).state, many.state) < 1e-6
    assert many.traces == 1 and not many.not_donated


@pytest.mark.parametrize(("method", "most"), [("soba", 2.05), ("saba", 3.1), ("srba", 2.1)])
def test_data_parallel_bytes(method: str, most: float):
    many = run("transformer", method, "data=8", steps=1)
    found = collectives(many.compiled.as_text())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(many.state.inner_params))
    assert set(found) == {"all-reduce"} and found["all-reduce"]["count"] == 1
    assert found["all-reduce"]["bytes"] <= most * size


def test_ragged_minibatches_weigh_every_example_alike():
    one, many = (run("mlp", "soba", mesh, ragged=True) for mesh in (None, "data=2,fsdp=4"))
    assert largest_difference(one.state, many.state) < 1e-6


def test_seldom_moving_adjoint():
    one, many = (
        run("mlp", "auto", mesh, update_every=2, adjoint_update_every=2)
        for mesh in (None, "data=8")
    )
    assert largest_difference(one.state, many.state) < 1e-6
    # auto's damping follows the residual, so there it is exact.
    ratio = many.info.adjoint_residual / one.info.adjoint_residual
    assert abs(ratio - 1) < 1e-5
