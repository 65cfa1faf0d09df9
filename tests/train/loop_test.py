"""The compiled loop: where chunks end, where the data lie and who refreshes changes no bit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import logistic, quadratics

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.base import Info
from bilevel_flax.train import device_feed as feed
from bilevel_flax.train import experiment as train
from bilevel_flax.train.run_config import CheckpointConfig, HealthConfig, RunConfig
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import InitialValues, Task
from bilevel_flax.train.train_loop import train_loop

STEPS = 25
WITHOUT_HEALTH = HealthConfig(every=0, summary=False)  # it has tests of its own


def finite_sums(source: Any) -> tuple[data.FiniteSum, data.FiniteSum]:
    """A problem of `problems.py` as the data that a loop takes."""
    sums = []
    for batches, weights in (
        (source.inner_batches, source.inner_weights),
        (source.outer_batches, source.outer_weights),
    ):
        num_batches, size = batches["index"].shape
        shares = np.asarray(weights, np.float32)
        leaves = jax.tree.map(np.asarray, batches)
        sums.append(data.FiniteSum(leaves, shares, num_batches * size, num_batches, size))
    return sums[0], sums[1]


def soba(source: Any, problem: bf.Problem | None = None) -> bf.BilevelSolver:
    return bf.soba(
        problem or source.problem,
        inner=optax.sgd(0.05),
        outer=optax.sgd(0.1, momentum=0.9),
        inner_weights=source.inner_weights,
        outer_weights=source.outer_weights,
    )


def run_all(
    chunks: StepRunner, state: bf.TrainState, steps: int, start: int = 0
) -> tuple[bf.TrainState, Info]:
    infos, step = [], start
    while step < steps:
        state, info = chunks.run(state, step, steps)
        step += len(info.inner_loss)
        infos.append(info)
    chunks.close()
    return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos)


def assert_same_bits(first: Any, second: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), first, second
    )


@functools.cache
def shared() -> tuple[Any, bf.BilevelSolver, StepRunner]:
    """One compiled loop for several tests: compiling is most of what they cost."""
    source = logistic()
    solver = soba(source)
    return source, solver, StepRunner(solver, *finite_sums(source), seed=3, on_device=True)


@functools.cache
def reference() -> tuple[Any, Any]:
    source, solver, chunks = shared()
    return run_all(chunks, solver.init(source.inner_params, source.outer_params), STEPS)


@pytest.mark.parametrize(("capacity", "on_device"), [(7, True), (1000, False)])
def test_neither_capacity_nor_streaming_changes_a_bit(
    capacity: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
):
    source, solver, _ = shared()
    sums = finite_sums(source)
    # Streamed chunks of 3 and 4 updates, which never end where the compiled ones do.
    monkeypatch.setattr(feed, "_CHUNK_BYTES", 4 * sums[0].nbytes // sums[0].num_batches)
    chunks = StepRunner(solver, *sums, seed=3, on_device=on_device, capacity=capacity)
    state = solver.init(source.inner_params, source.outer_params)
    state, info = run_all(chunks, state, STEPS)
    assert_same_bits((state, info), reference())
    if not on_device:  # a new stream starts in the middle of one of its chunks
        state, _ = run_all(chunks, solver.init(source.inner_params, source.outer_params), 11)
        state, _ = run_all(chunks, state, STEPS, start=11)
        assert_same_bits(state, reference()[0])


@pytest.mark.parametrize("length", [1, 4])
def test_the_length_of_chunks_does_not_change_a_bit(length: int):
    # It depends on the measured speed, so every run has its own.
    source, solver, chunks = shared()
    state = solver.init(source.inner_params, source.outer_params)
    step, infos = 0, []
    while step < STEPS:
        chunks._count = length
        state, info = chunks.run(state, step, STEPS)
        assert len(info.inner_loss) == min(length, STEPS - step)
        infos.append(info)
        step += length
    info = jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos)
    assert_same_bits((state, info), reference())


def test_updates_are_those_of_the_solver_on_the_samplers_minibatches():
    source, solver, chunks = shared()
    state = solver.init(source.inner_params, source.outer_params)
    update = jax.jit(solver.update)
    for i, j in zip(*(sampler.ids(0, STEPS) for sampler in chunks.samplers), strict=True):
        state, _ = update(state, source.batch(i, j))
    looped, info = reference()
    assert int(looped.step) == STEPS
    assert info.inner_loss.shape == (STEPS,)
    # Another program, so rounding may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), looped, state)


def test_one_trace_serves_the_whole_run():
    source = quadratics()
    traces = 0

    def counted(z, x, batch):
        nonlocal traces
        traces += 1
        return source.problem.inner_loss(z, x, batch)

    problem = bf.Problem(counted, source.problem.outer_loss)
    solver = soba(source, problem)
    state = solver.init(source.inner_params, source.outer_params)
    jax.eval_shape(solver.update, state, source.batch(0, 0))
    once, traces = traces, 0
    chunks = StepRunner(solver, *finite_sums(source), on_device=True, capacity=4)
    chunks.compile(state, 0)
    assert traces == once
    run_all(chunks, state, STEPS)
    assert traces == once
    # Compiled ahead of time: other shapes are an error, never a second compilation.
    assert isinstance(chunks._chunk, jax.stages.Compiled)
    with pytest.raises(TypeError):
        chunks.run(state.replace(inner_params={"other": jnp.zeros(2)}), STEPS, STEPS + 1)


def test_every_leaf_of_the_state_is_donated():
    source, solver, chunks = shared()
    before = solver.init(source.inner_params, source.outer_params)
    chunks.run(before, 0, 5)
    kept = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(before)
        if not leaf.is_deleted()
    ]
    assert not kept


def test_a_looped_step_costs_what_an_unrolled_one_costs():
    source = quadratics(batch=64, inner_shapes={"w": (30, 3)}, outer_shapes={"u": (10,)})
    solver = soba(source)
    chunks = StepRunner(solver, *finite_sums(source), on_device=True)
    state = solver.init(source.inner_params, source.outer_params)
    chunks.compile(state, 0)

    def unrolled(state, batches):
        infos = []
        for batch in batches:
            state, info = solver.update(state, batch)
            infos.append(info)
        return state, infos

    batches = [source.batch(i, i) for i in range(2)]
    flops = lambda compiled: compiled.cost_analysis()["flops"]
    two = flops(jax.jit(unrolled).lower(state, batches).compile())
    # XLA counts a loop's body once.
    assert flops(chunks._chunk) == pytest.approx(two / 2, rel=0.02)


def poisoned(side: str, seed: int, after: int) -> tuple[Task, bf.BilevelSolver, int]:
    source = quadratics()
    sums = dict(zip(("inner", "outer"), finite_sums(source), strict=True))
    order = data.Sampler(sums[side].num_batches, 2 * seed + (side == "outer")).ids(0, 100)
    lost = int(order[after])
    first = int(np.argmax(order == lost))
    leaf = sums[side].batches["c" if side == "inner" else "q"]
    leaf = leaf.copy()
    leaf[lost] = np.nan
    batches = sums[side].batches | {"c" if side == "inner" else "q": leaf}
    sums[side] = data.FiniteSum(
        batches,
        sums[side].weights,
        sums[side].num_samples,
        sums[side].num_batches,
        sums[side].batch_size,
    )
    task = Task(
        problem=source.problem,
        init=lambda rng: InitialValues(source.inner_params, source.outer_params),
        inner=sums["inner"],
        outer=sums["outer"],
        evaluate=lambda state: {},
    )
    return task, soba(source), first


@pytest.mark.parametrize("side", ["inner", "outer"])
def test_a_nan_ends_the_chunk_before_it_touches_the_state(side: str):
    task, solver, first = poisoned(side, seed=0, after=3)
    start = task.init(jax.random.PRNGKey(0))
    state = solver.init(start.inner_params, start.outer_params)
    chunks = StepRunner(solver, task.inner, task.outer, on_device=True)
    good, _ = run_all(chunks, state, first)
    chunks._count = STEPS  # one chunk for all
    state = solver.init(start.inner_params, start.outer_params)
    state, info = chunks.run(state, 0, STEPS)
    assert len(info.inner_loss) == first + 1
    finite = [bool(direction[-1]) for direction in info.finite]
    assert finite == ([False, True, True] if side == "inner" else [True, False, True])
    assert_same_bits(state, good)


@pytest.mark.parametrize("side", ["inner", "outer"])
def test_the_run_names_step_direction_and_what_to_try(side: str, tmp_path):
    task, solver, first = poisoned(side, seed=0, after=3)
    run = RunConfig(
        steps=50, on_device=True, checkpoint=CheckpointConfig(every=1), health=WITHOUT_HEALTH
    )
    with pytest.raises(train.Diverged) as caught:
        train_loop(run, tmp_path, task, solver)
    message = str(caught.value)
    assert message.startswith(f"step {first}: not finite: the direction of ")
    assert ("inner (D_z)" in message) == (side == "inner")
    assert ("adjoint (D_v)" in message) == (side == "outer")
    assert "try a lower" in message
    assert "\n" not in message
    if first:
        assert f"the checkpoint of step {first} is kept" in message
        assert (tmp_path / "checkpoints" / str(first)).is_dir()


PERIOD = 6


def counting_solver() -> bf.BilevelSolver:
    """Refreshes every PERIOD steps; its state only counts which minibatches it was handed."""
    source = quadratics()
    plain = soba(source)
    sizes = {"inner": source.num_inner, "outer": source.num_outer}

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        state = plain.init(inner_params, outer_params)
        memory = {
            "cursor": jnp.int32(0),
            "due": jnp.int32(0),
            "inner": jnp.zeros(sizes["inner"]),
            "outer": jnp.zeros(sizes["outer"]),
        }
        return state.replace(estimator_state=memory)

    def update(state, batch):
        stepped, info = plain.update(state, batch)
        return stepped, info._replace(oracle_units=jnp.float32(4))

    def refresh(state, batch):
        memory = dict(state.estimator_state)
        side = "inner" if batch.outer is None else "outer"
        minibatch, position = getattr(batch, side), getattr(batch, f"{side}_id")
        # What was read must be the minibatch that the id names.
        mark = minibatch["index"][0] + 1
        memory[side] = memory[side].at[position].add(mark)
        cursor = memory["cursor"] + 1
        done = cursor == sum(sizes.values())
        memory["cursor"] = jnp.where(done, 0, cursor)
        memory["due"] = jnp.where(done, memory["due"] + PERIOD, memory["due"])
        return state.replace(estimator_state=memory)

    return plain._replace(
        init=init,
        update=update,
        refresh=refresh,
        next_refresh=lambda state: state.estimator_state["due"],
        refresh_cursor=lambda state: state.estimator_state["cursor"],
        method=plain.method._replace(refresh_units=(2.0, 3.0)),
    )


@pytest.mark.parametrize("on_device", [True, False])
def test_a_full_pass_visits_every_minibatch_once_and_can_be_interrupted(on_device: bool):
    source, solver = quadratics(), counting_solver()
    sums = finite_sums(source)
    state = solver.init(source.inner_params, source.outer_params)
    point = jax.tree.map(np.array, state.variables)
    # Another loop from the second call on, as after a kill.
    loops = [StepRunner(solver, *sums, on_device=on_device, capacity=3) for _ in range(2)]
    units, calls = 0.0, 0
    while int(solver.next_refresh(state)) <= 0:
        state, spent = loops[min(calls, 1)].refresh(state)
        units, calls = units + spent, calls + 1
    assert calls == 3  # 3 + 1 inner, 3 outer
    assert units == source.num_inner * 2 + source.num_outer * 3
    for side, finite_sum in zip(("inner", "outer"), sums, strict=True):
        expected = finite_sum.batches["index"][:, 0] + 1
        np.testing.assert_array_equal(state.estimator_state[side], expected)
    assert int(state.step) == 0
    assert_same_bits(state.variables, point)


def test_the_run_stops_for_refreshes_and_counts_their_cost(tmp_path):
    source, solver = quadratics(), counting_solver()
    sums = finite_sums(source)
    task = Task(
        problem=source.problem,
        init=lambda rng: InitialValues(source.inner_params, source.outer_params),
        inner=sums[0],
        outer=sums[1],
        evaluate=lambda state: {},
    )
    run = RunConfig(steps=20, on_device=True, health=WITHOUT_HEALTH)
    state, totals, *_ = train_loop(run, tmp_path, task, solver)
    passes = 1 + (20 - 1) // PERIOD
    assert totals["oracle_units"] == 20 * 4 + passes * (source.num_inner * 2 + source.num_outer * 3)
    expected = passes * (sums[0].batches["index"][:, 0] + 1)
    np.testing.assert_array_equal(state.estimator_state["inner"], expected)


@pytest.mark.parametrize("on_device", [True, False])
def test_several_minibatches_an_update_have_a_leading_axis(on_device: bool):
    source = quadratics()
    sums = finite_sums(source)
    plain = soba(source)
    seen: list[Any] = []

    def update(state, batch):
        seen.append(jax.tree.map(jnp.shape, batch))
        state, info = plain.update(state, source.batch(0, 0))
        marks = {
            "inner": batch.inner["index"].sum() + 100 * batch.inner_id[0],
            "outer": batch.outer["index"].sum() + 100 * batch.outer_id[1],
        }
        return state, info._replace(metrics=marks)

    solver = plain._replace(update=update, method=plain.method._replace(batches=(3, 2)))
    chunks = StepRunner(solver, *sums, on_device=on_device)
    state = solver.init(source.inner_params, source.outer_params)
    _, info = run_all(chunks, state, STEPS)
    assert seen[0].inner["A"] == (3, *sums[0].batches["A"].shape[1:])
    assert seen[0].outer["P"] == (2, *sums[1].batches["P"].shape[1:])
    assert (seen[0].inner_id, seen[0].outer_id) == ((3,), (2,))
    for side, finite_sum, sampler, which in zip(
        ("inner", "outer"), sums, chunks.samplers, (0, 1), strict=True
    ):
        ids = sampler.ids(0, STEPS)
        expected = finite_sum.batches["index"][ids].sum((1, 2)) + 100 * ids[:, which]
        np.testing.assert_array_equal(info.metrics[side], expected)
