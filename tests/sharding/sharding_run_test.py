"""A run's mesh from its config, and the loop on it."""

from __future__ import annotations

import dataclasses

import jax
import ml_collections
import numpy as np
import pytest
from sharding_problems import MINIBATCHES, largest_difference, setting, solver

import bilevel_flax as bf
from bilevel_flax import sharding
from bilevel_flax.plan.collectives import collectives
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.setup import make_layout
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import InitialValues, Task


def task_of(problem=None, rules=None) -> Task:
    made = setting("plain")
    return Task(
        problem=problem or made.problem,
        init=lambda rng: InitialValues(made.inner_params, made.outer_params),
        inner=made.inner,
        outer=made.outer,
        evaluate=lambda state: {},
        rules=rules,
    )


def config(**keys) -> RunConfig:
    nothing = {"call": "builtins:dict"}
    given = {"steps": 1, "task": nothing, "solver": nothing} | keys
    return RunConfig.read(ml_collections.ConfigDict(given))


@pytest.mark.parametrize(
    ("keys", "rules", "says"),
    [
        ({"mesh": "data=3"}, None, "--config.mesh=data=3: .* there are 8"),
        ({"mesh": "rows=8"}, None, 'the axis "rows"'),
        ({"mesh": "data=8", "reduction": "best"}, None, "choose one of shard_map, gspmd, None"),
        ({"mesh": "data=4,tensor=2", "reduction": "shard_map"}, None, "take tensor=1"),
        ({"mesh": "fsdp=8"}, [("kernel", "fsdp")], "--config.rules: .*'kernel' matches no leaf"),
    ],
)
def test_a_mesh_that_cannot_be_had_is_one_line(keys, rules, says: str):
    with pytest.raises(ConfigError, match=says) as error:
        make_layout(config(**keys), task_of(rules=rules))
    assert "\n" not in str(error.value)


def test_a_batch_size_that_the_mesh_does_not_divide_is_one_line():
    made = task_of()
    cut = jax.tree.map(lambda leaf: leaf[:, :12], made.inner.batches)
    made = dataclasses.replace(made, inner=dataclasses.replace(made.inner, batches=cut))
    with pytest.raises(ConfigError, match="the inner data .* holds 12 .* multiple of 8"):
        make_layout(config(mesh="data=8"), made)


def test_without_a_mesh_there_is_no_layout():
    made = task_of()
    assert make_layout(config(), made) == (None, made, "")


def test_losses_decide_who_places_the_reductions():
    _, made, said = make_layout(config(mesh="data=8"), task_of())
    assert made.problem.evaluate is not None and said.endswith("one reduction a step")
    plain = setting("plain").problem
    squared = dataclasses.replace(plain, inner_loss=lambda z, x, b: plain.inner_loss(z, x, b) ** 2)
    _, made, said = make_layout(config(mesh="data=8"), task_of(squared))
    assert made.problem.evaluate is None and "inner_loss of a minibatch is" in said
    _, made, _ = make_layout(config(mesh="data=8", reduction="gspmd"), task_of())
    assert made.problem.evaluate is None


def test_a_mesh_takes_the_examples_that_are_asked_for():
    layout = sharding.Layout(sharding.make_mesh("data=8"))
    rows = np.arange(3 * 16 * 2).reshape(3, 16, 2)
    placed = layout.place_batches({"a": rows}, np.array([[2, 0], [1, 1]]))["a"]
    np.testing.assert_array_equal(placed, rows[[[2, 0], [1, 1]]])
    assert placed.addressable_shards[0].data.shape == (2, 2, 2, 2)


def looped(mesh_text: str | None, on_device: bool, microbatches: int = 1):
    made = setting("plain")
    problem = bf.oracles.microbatched(made.problem, microbatches)
    layout = None
    if mesh_text is not None:
        mesh = sharding.make_mesh(mesh_text)
        layout = sharding.Layout(mesh, None, problem)
        problem = sharding.data_parallel(problem, mesh)
    chosen = solver("srba", made, problem)
    loop = StepRunner(
        chosen, made.inner, made.outer, on_device=on_device, capacity=8, layout=layout
    )
    state = chosen.init(made.inner_params, made.outer_params)
    if layout is not None:
        state = layout.place_state(state)
    step = 0
    while step < 20:
        due = int(chosen.next_refresh(state))
        if due <= step:
            state, _ = loop.refresh(state)
            continue
        state, info = loop.run(state, step, min(20, due))
        step += len(info.inner_loss)
    text = loop._chunk.as_text()
    loop.close()
    return jax.tree.map(np.array, state), collectives(text)


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [True, False], ids=["on_device", "streamed"])
def test_the_loop_on_a_mesh_is_the_loop_on_one_device(on_device: bool):
    one, nothing = looped(None, True)
    many, found = looped("data=2,fsdp=4", on_device)
    assert not nothing and "reduce-scatter" in found
    assert largest_difference(one, many) < 1e-6
    assert MINIBATCHES == 3


@pytest.mark.slow
def test_microbatches_reduce_once():
    whole, once = looped("data=8", True)
    parts, found = looped("data=8", True, microbatches=2)
    assert found["all-reduce"]["bytes"] <= once["all-reduce"]["bytes"] + 64
    assert largest_difference(whole, parts) < 1e-6
    assert isinstance(whole, bf.TrainState)
