"""A host with optimisers of its own takes the same trajectory as the solvers, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import logistic

import bilevel_flax as bf
from bilevel_flax import per_sample
from bilevel_flax.base import Method
from bilevel_flax.solvers import cheap_steps
from bilevel_flax.solvers.directions import HostState
from bilevel_flax.solvers.saba import estimator as saba_estimator
from bilevel_flax.solvers.srba import estimator as srba_estimator

# Without fusions (which round differently in two programs) the same operations give the same bits.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "fusion"}
quick = functools.partial(jax.jit, compiler_options=OPTIONS)

N, M, STEPS = 2, 2, 5
TX = bf.Variables(optax.adam(0.05), optax.sgd(0.1, momentum=0.9), optax.adam(0.03))
TASK = logistic(num_samples=20, num_outer_samples=16, batch=10)


def stateful(problem: bf.Problem) -> bf.Problem:
    """Losses with a running mean and noise of their own."""

    def inner(z, x, batch, model_state, rng):
        noise = 0.01 * jax.random.normal(rng, ())
        loss = (1 + noise) * problem.inner_loss(z, x, batch)
        return loss, bf.Aux({"mean": 0.9 * model_state["mean"] + 0.1 * loss}, {"noise": noise})

    def outer(z, x, batch, model_state, rng):
        return (1 + 0.1 * model_state["mean"]) * problem.outer_loss(z, x, batch), bf.Aux()

    return bf.Problem(inner, outer, stateful=True, per_sample=problem.per_sample)


def start(problem: bf.Problem) -> dict[str, Any]:
    context = {"model_state": {"mean": jnp.float32(0.0)}} if problem.stateful else {}
    return {"rng": jax.random.PRNGKey(3), **context}


def batches(step: int) -> bf.Batch:
    return TASK.batch(step % N, step // N % M)


def of_solver(solver: bf.BilevelSolver, problem: bf.Problem) -> bf.TrainState:
    state = solver.init(TASK.inner_params, TASK.outer_params, **start(problem))
    update, refresh = quick(solver.update), quick(solver.refresh)
    for step in range(STEPS):
        if int(solver.next_refresh(state)) <= step:
            for part in passes():
                state = refresh(state, part)
        state, info = update(state, batches(step))
        assert info.ok
    return state


def passes():
    for i in range(N):
        yield TASK.batch(i, 0)._replace(outer=None, outer_id=None)
    for j in range(M):
        yield TASK.batch(0, j)._replace(inner=None, inner_id=None)


def of_host(directions, problem: bf.Problem, rows: bool = False, outer=TX.outer):
    """Three Optax steps as a user writes them."""
    state = directions.init(TASK.inner_params, TASK.outer_params, **start(problem))
    tx = TX._replace(outer=outer)
    x = per_sample.marked(problem.per_sample, state.outer_params) if rows else state.outer_params
    points = (state.inner_params, state.adjoint, x)
    opts = bf.Variables(*(t.init(point) for t, point in zip(tx, points, strict=True)))

    @quick
    def train_step(state, opts, batch):
        found, state, info, _ = directions(state, batch)
        moved, new = [], []
        for t, direction, opt, point in zip(tx, found, opts, state.variables, strict=True):
            updates, opt = t.update(direction, opt, point)
            moved.append(per_sample.apply_updates(point, updates))
            new.append(opt)
        names = ("inner_params", "adjoint", "outer_params")
        return state.replace(**dict(zip(names, moved, strict=True))), bf.Variables(*new), info

    for step in range(STEPS):
        if int(directions.next_refresh(state)) <= step:
            for part in passes():
                state = quick(directions.refresh)(state, part)
        state, opts, info = train_step(state, opts, batches(step))
        assert info.ok
    return state


def same(found, expected):
    for field in dataclasses.fields(HostState):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


COUNTS = {"num_inner_batches": N, "num_outer_batches": M}
METHODS = {
    "soba": (bf.soba, lambda problem: None),
    "saba": (functools.partial(bf.saba, **COUNTS), lambda p: saba_estimator(p, N, M)),
    "srba": (
        functools.partial(bf.srba, **COUNTS, period=3),
        lambda p: srba_estimator(p, N, M, lambda step: step + 3),
    ),
}


@pytest.mark.filterwarnings("ignore:s.ba compares visits")
@pytest.mark.parametrize(("name", "has_state"), [("soba", True), ("saba", True), ("srba", False)])
def test_the_hosts_trajectory_is_the_solvers(name: str, has_state: bool):
    problem = stateful(TASK.problem) if has_state else TASK.problem
    make, estimator = METHODS[name]
    tx = dict(zip(("inner", "adjoint", "outer"), TX, strict=True))
    expected = of_solver(make(problem, **tx), problem)
    same(of_host(bf.directions(problem, estimator=estimator(problem)), problem), expected)


def test_rows_reach_a_row_sparse_optimiser_as_they_are():
    problem, lazy = TASK.problem, bf.outer.lazy_adam(0.03)
    expected = of_solver(bf.soba(problem, inner=TX.inner, adjoint=TX.adjoint, outer=lazy), problem)
    same(of_host(bf.directions(problem, rows=True), problem, True, lazy), expected)


def test_what_is_not_finite_leaves_the_memory_alone_and_no_table_moves():
    estimator = saba_estimator(TASK.problem, N, M, lazy=True)
    run = quick(bf.directions(TASK.problem, estimator, rows=True))
    state = bf.directions(TASK.problem, estimator).init(TASK.inner_params, TASK.outer_params)
    state = run(state, batches(0)).state
    step = run(
        state.replace(adjoint=jax.tree.map(lambda v: v * jnp.nan, state.adjoint)), batches(1)
    )
    assert not step.info.ok
    assert step.directions.outer["logits"].index.min() >= len(state.outer_params["logits"])
    same(
        step.state.replace(adjoint=state.adjoint, estimator_state=()),
        state.replace(estimator_state=()),
    )
    # The rows of that minibatch are written anew at its next visit: nothing is left of the NaN.
    again, expected = (
        run(s, batches(1)) for s in (step.state.replace(adjoint=state.adjoint), state)
    )
    assert again.info.ok
    same(again.state, expected.state)


def test_what_rests_is_told():
    problem = bf.Problem(lambda z, x, b: (z - x) ** 2, lambda z, x, b: z**2)
    directions = bf.directions(problem, estimator=cheap_steps.estimator(update_every=2))
    assert directions.method == Method("directions", 2.5)
    state, active = directions.init(jnp.float32(1.0), jnp.float32(0.0)), []
    for _ in range(4):
        step = directions(state, bf.Batch(0.0, 0.0))
        state = step.state
        assert step.active.inner is None
        active.append(bool(step.active.outer))
    assert sum(active[:2]) == sum(active[2:]) == 1


@pytest.mark.parametrize("name", ["soba", "srba"])
def test_a_host_that_moves_z_hands_it_over(name: str):
    problem, make = TASK.problem, METHODS[name][0]
    adjoint, outer = TX.adjoint, TX.outer
    solver = make(problem, inner=None, adjoint=adjoint, outer=outer)
    state = solver.init(TASK.inner_params, TASK.outer_params)
    whole = make(problem, inner=optax.sgd(0.1), adjoint=adjoint, outer=outer)
    expected = whole.init(TASK.inner_params, TASK.outer_params)
    update, other = quick(solver.update), quick(whole.update)
    refresh, other_refresh = quick(solver.refresh), quick(whole.refresh)
    for step in range(STEPS):
        if int(solver.next_refresh(state)) <= step:
            for part in passes():
                state = refresh(state, part, inner_params=expected.inner_params)
                expected = other_refresh(expected, part)
        z = expected.inner_params
        state, info = update(state, batches(step), inner_params=z)
        expected, _ = other(expected, batches(step))
        assert info.ok
        jax.tree.map(np.testing.assert_array_equal, state.inner_params, z)
    for field in ("adjoint", "outer_params", "adjoint_opt_state", "outer_opt_state"):
        a, b = getattr(state, field), getattr(expected, field)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_auto_leaves_z_to_a_host():
    problem = bf.Problem(lambda z, x, b: (z - x) ** 2, lambda z, x, b: (z - 3) ** 2)
    tx = optax.sgd(0.3)
    solver = bf.auto(problem, inner=None, adjoint=tx, steps=300, dense_learning_rate=0.05)
    z, x = jnp.float32(0.0), jnp.float32(0.0)
    state, opt = solver.init(z, x), tx.init(z)

    @quick
    def train_step(z, opt, state):
        updates, opt = tx.update(2 * (z - state.outer_params), opt, z)
        state, _ = solver.update(state, bf.Batch(0.0, 0.0), inner_params=z)
        return optax.apply_updates(z, updates), opt, state

    for _ in range(300):
        z, opt, state = train_step(z, opt, state)
    assert float(state.outer_params) == pytest.approx(3, abs=0.1)


LORA = {"base": False, "lora": True}


def adapted(z, x, batch):
    return jnp.mean(jnp.exp(x) * (batch @ (z["base"] + z["lora"]["a"] @ z["lora"]["b"])) ** 2)


def test_frozen_parameters_are_no_part_of_v(x64):
    rng = np.random.default_rng(0)
    a, b, base, batch = (rng.normal(size=s) for s in ((4, 2), (2, 3), (4, 3), (5, 4)))
    z = {"base": jnp.asarray(base), "lora": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}
    problem = bf.Problem(adapted, adapted)
    directions = bf.directions(bf.oracles.trainable(problem, LORA))
    alone = bf.directions(
        bf.Problem(*(lambda lora, x, batch: adapted({**z, "lora": lora}, x, batch),) * 2)
    )
    v = jax.tree.map(jnp.ones_like, z)
    state = directions.init(z, jnp.zeros(())).replace(adjoint=v)
    part = alone.init(z["lora"], jnp.zeros(())).replace(adjoint=v["lora"])
    found, expected = directions(state, bf.Batch(batch, batch)), alone(part, bf.Batch(batch, batch))
    assert not np.any(found.directions.inner["base"])
    assert not np.any(found.directions.adjoint["base"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    for d, e in zip(found.directions, expected.directions, strict=True):
        jax.tree.map(close, d["lora"] if isinstance(d, dict) and "lora" in d else d, e)
    close(found.info.adjoint_residual, expected.info.adjoint_residual)
    held = bf.oracles.trainable(problem, LORA)
    point = bf.Variables(z, v, jnp.zeros(()))
    assert bf.diagnostics.check_symmetry(held, point, batch).ok  # it is held by intent


def test_mistakes_are_told_in_one_line():
    problem = TASK.problem
    with pytest.raises(TypeError, match="estimator='soba' is no Estimator: leave it out"):
        bf.directions(problem, estimator="soba")  # pyright: ignore[reportArgumentType]
    for make in (bf.soba, functools.partial(bf.auto, steps=3)):
        with pytest.raises(ValueError, match="inner=None leaves z to a host.*adjoint="):
            make(problem, inner=None, outer=TX.outer)
    solver = bf.soba(problem, inner=None, adjoint=TX.adjoint, outer=TX.outer)
    state = solver.init(TASK.inner_params, TASK.outer_params)
    with pytest.raises(ValueError, match="adjoint's tree differs from inner_params'"):
        solver.update(state, batches(0), inner_params={"other": jnp.ones(3)})
    own = bf.soba(problem, inner=TX.inner, outer=TX.outer)
    with pytest.raises(ValueError, match="make the solver with inner=None"):
        own.update(state, batches(0), inner_params=TASK.inner_params)
    host = bf.directions(problem)
    wrong = host.init(TASK.inner_params, TASK.outer_params)
    wrong = wrong.replace(adjoint={**wrong.adjoint, "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="v has z's shapes and dtypes exactly"):
        host(wrong, batches(0))
    with pytest.raises(ValueError, match="is not a pytree prefix of inner_params"):
        bf.oracles.trainable(problem, {"no": True}).inner_loss(TASK.inner_params, None, {})
    with pytest.raises(ValueError, match="nothing is learned"):
        bf.oracles.trainable(problem, False).inner_loss(TASK.inner_params, None, {})
