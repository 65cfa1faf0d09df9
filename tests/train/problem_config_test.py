"""How derivatives are computed and where tables lie, set from the command line."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.solvers.memory import tables
from bilevel_flax.train import config as configs
from bilevel_flax.train import setup as run_config
from bilevel_flax.train.config import ConfigError, config_differences
from bilevel_flax.train.run_config import RESUME_SAFE

ROOT = Path(__file__).parents[2]
HYPERCLEANING = str(ROOT / "configs" / "mnist_hypercleaning.py")
PENALTIES = str(ROOT / "configs" / "hyperparameter_selection.py")
SMALL = ("data.splits=64,32,8", "batch_size=16", "steps=3", "baselines=False")


def task_and_solver(spec, *overrides):
    config = configs.load(spec, overrides)
    task = run_config.make_task(config)
    return task, run_config.make_solver(config.solver, task)


def after(spec, *overrides, steps=2):
    task, solver = task_and_solver(spec, *overrides)
    start = task.init(jax.random.key(0))
    state = solver.init(start.inner_params, start.outer_params, model_state=start.model_state)
    update = jax.jit(solver.update)
    for step in range(steps):
        first, second = (data.gather(side, np.array(step)) for side in (task.inner, task.outer))
        ids = jnp.int32(step), jnp.int32(step)
        state, info = update(state, bf.Batch(first, second, *ids))
        bf.check_finite(info)
    return state


def distance(found, expected):
    square = lambda tree: sum(float(jnp.sum(jnp.square(a))) for a in jax.tree.leaves(tree))
    apart = jax.tree.map(
        lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), found, expected
    )
    return (square(apart) / square(expected)) ** 0.5


@pytest.fixture(scope="module")
def plain():
    return after(f"{HYPERCLEANING}:saba", *SMALL)


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (("problem.microbatches=4",), 1e-6),
        (("problem.compute_dtype=bfloat16",), 0.02),
        (("problem.compute_dtype=bfloat16", "problem.microbatches=2", "problem.remat=True"), 0.02),
        (("solver.table_dtype=bfloat16",), 0.02),
        (("solver.table_placement=pinned_host",), 0.0),
        (("solver.memory=compact", "problem.compute_dtype=bfloat16"), 0.02),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_setting_gives_the_plain_step(plain, overrides, tolerance):
    if (
        "solver.table_placement=pinned_host" in overrides
        and tables.HOST not in tables.memory_kinds()
    ):
        pytest.skip("JAX's device reaches no pinned_host memory")
    found = after(f"{HYPERCLEANING}:saba", *SMALL, *overrides)
    for name in ("inner_params", "adjoint", "outer_params"):
        apart = distance(getattr(found, name), getattr(plain, name))
        assert apart <= tolerance, name
        assert {a.dtype for a in jax.tree.leaves(getattr(found, name))} == {jnp.dtype("float32")}
    if any("bfloat16" in override for override in overrides):
        assert distance(found.adjoint, plain.adjoint) > 0
    table = jax.tree.leaves(found.estimator_state.inner.table)[0]
    assert (table.dtype == jnp.bfloat16) == ("solver.table_dtype=bfloat16" in overrides)
    on_host = table.sharding.memory_kind == tables.HOST
    assert on_host == ("solver.table_placement=pinned_host" in overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("problem.microbatches=3", r"microbatches=3 does not divide the inner batch size 16"),
        ("problem.microbatches=0", r"config.problem.microbatches must be an integer >= 1, got 0"),
        ("problem.compute_dtype=float16", r"config.problem: compute_dtype='float16' is not among"),
        ("problem.micro=2", r"problem.micro.*problem.microbatches"),
        ("solver.table_placement=host", r"table_placement='host' is unknown"),
    ],
)
def test_mistakes_are_one_line(override, message):
    with pytest.raises((ConfigError, ValueError), match=message) as caught:
        task_and_solver(f"{HYPERCLEANING}:saba", *SMALL, override)
    assert "\n" not in str(caught.value)


def test_a_run_is_not_continued_with_other_settings():
    saved, now = (
        configs.plain(configs.load(PENALTIES, [f"problem.microbatches={count}"]))
        for count in (1, 2)
    )
    assert config_differences(saved, now, RESUME_SAFE) == ["problem.microbatches: saved 1, now 2"]
