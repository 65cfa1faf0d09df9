"""Checkpoints that format 1 wrote: `old_format.zip` is one, of the version before format 2.

`old_leaves.json` has the leaves that the states of solvers had then, as checkpoints name them.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from own_loop_test import POINT, SOLVERS, make

import bilevel_flax as bf
from bilevel_flax.checkpoints import Checkpointer, CheckpointError, records
from bilevel_flax.checkpoints.errors import CheckpointMismatch
from bilevel_flax.checkpoints.template import Template


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with zipfile.ZipFile(Path(__file__).with_name("old_format.zip")) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def make_solver(inner: Any) -> bf.BilevelSolver:
    problem = bf.Problem(
        lambda z, x, batch: jnp.sum((z["dense"]["w"] - x) ** 2),
        lambda z, x, batch: jnp.sum((z["dense"]["w"] - 3.0) ** 2),
    )
    return bf.soba(problem, inner=inner, outer=optax.sgd(0.1))


def init(solver: bf.BilevelSolver) -> bf.TrainState:
    z = {"dense": {"w": jnp.zeros(3)}, "half": jnp.zeros(4, jnp.bfloat16)}
    model_state = {"mean": jnp.zeros(2), "empty": jnp.zeros((0, 2))}
    return solver.init(z, jnp.float32(0), model_state=model_state, rng=jax.random.key(0))


def check(state: bf.TrainState) -> None:
    np.testing.assert_array_equal(state.inner_params["dense"]["w"], np.arange(3))
    np.testing.assert_array_equal(state.inner_params["half"], np.arange(4))
    assert state.inner_params["half"].dtype == jnp.bfloat16
    assert float(state.outer_params) == 1.0


def test_a_whole_state_comes_back(directory: Path):
    template = init(make_solver(optax.adam(0.1)))
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.read_meta() == (2, {"at": 2})
        restored = checkpointer.restore(template)
        assert restored is not None and (restored.step, restored.meta) == (2, {"at": 2})
        check(restored.state)
        assert int(restored.state.step) == 2
        assert jnp.all(jax.random.key_data(restored.state.rng) == jnp.uint32([0, 7]))
        assert restored.state.model_state["empty"].shape == (0, 2)
        checkpointer.save(3, restored.state)  # The run goes on beside it, in the new format.
    check(bf.checkpoints.restore(directory, template))


def test_a_part_and_a_warm_start(directory: Path):
    network = bf.checkpoints.restore_inner(directory)
    np.testing.assert_array_equal(network["dense"]["w"], np.arange(3))
    solver = make_solver(optax.sgd(0.1))
    fresh = init(solver)
    check(
        bf.checkpoints.warm_start(
            directory, solver, fresh.inner_params, fresh.outer_params, model_state=fresh.model_state
        )
    )


def test_its_damage_is_found(directory: Path):
    (directory / "2" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="step 2: its arrays cannot be read"):
        bf.checkpoints.restore_inner(directory)


OLD_LEAVES = json.loads(Path(__file__).with_name("old_leaves.json").read_text())


@pytest.mark.parametrize("name", SOLVERS)
def test_the_leaves_of_a_state_are_named_as_before(name: str):
    state = make(name).init(*POINT, rng=jax.random.key(1))
    described = {
        name: records.describe(name, leaf) for name, leaf in records.named_leaves(state).items()
    }
    leaves = {n: f"{r.dtype}{list(r.shape)}" for n, r in described.items()}
    newer = {n for n in leaves if ".lost." in n}  # SABA's, which start at 0 where they lack
    assert bool(newer) == (name == "saba")
    assert {n: kind for n, kind in leaves.items() if n not in newer} == OLD_LEAVES[name]


def test_a_leaf_that_is_newer_than_the_checkpoint_starts_at_zero():
    state = make("saba").init(*POINT, rng=jax.random.key(1))
    template = Template(state)
    saved = {n: records.describe(n, leaf) for n, leaf in records.named_leaves(state).items()}
    old = {n: record for n, record in saved.items() if ".lost." not in n}
    leaves = template.match(old, "there")
    assert set(leaves) == set(old)
    filled = template.fill(
        {n: leaf + 1 if leaf.dtype == jnp.float32 else leaf for n, leaf in leaves.items()}
    )
    assert jax.tree.structure(filled) == jax.tree.structure(state)
    assert float(filled.inner_params["w"].min()) == float(state.inner_params["w"].min()) + 1
    assert all(not leaf.any() for leaf in jax.tree.leaves(filled.estimator_state.inner.lost))
    with pytest.raises(CheckpointMismatch, match="no such leaf"):
        template.match({n: record for n, record in old.items() if "hvp" not in n}, "there")


def test_another_optimiser_or_an_older_version_is_told_from_another_model():
    """New leaves in the state of `bf.auto`, say: z and x are what they were."""
    state = make("saba").init(*POINT, rng=jax.random.key(1))
    template = Template(state)
    saved = {n: records.describe(n, leaf) for n, leaf in records.named_leaves(state).items()}
    lacks = next(n for n in saved if n.startswith("outer_opt_state"))
    older = {n: record for n, record in saved.items() if n != lacks}
    with pytest.raises(
        CheckpointMismatch, match="same z and x under another .*version.*warm_start"
    ):
        template.match(older, "there")
    leaf = next(n for n in saved if n.startswith("inner_params"))
    other = older | {leaf: saved[leaf]._replace(shape=(99,))}
    with pytest.raises(CheckpointMismatch, match="a checkpoint of another model"):
        template.match(other, "there")
