"""A run's health: what is measured, when, what it costs, and the words for what is not healthy."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from diagnostics_test import finite_sums
from problems import quadratics

import bilevel_flax as bf
from bilevel_flax import data, diagnostics
from bilevel_flax.train import step_time, summary
from bilevel_flax.train.health import monitor as health
from bilevel_flax.train.health import thresholds as health_ranges
from bilevel_flax.train.report import health as health_report
from bilevel_flax.train.report.page import write_report
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import InitialValues, Task


@functools.cache
def running() -> tuple[Task, bf.BilevelSolver, StepRunner, bf.TrainState, Any]:
    """One compiled loop for several tests, and a state after 40 steps."""
    source = quadratics(num_inner=6, num_outer=5)
    inner, outer = finite_sums(source)
    task = Task(
        problem=source.problem,
        init=lambda rng: InitialValues(source.inner_params, source.outer_params),
        inner=inner,
        outer=outer,
        held_out=outer,
        evaluate=lambda state: {},
    )
    solver = bf.soba(source.problem, inner=optax.sgd(0.1), outer=optax.sgd(0.01))
    loop = StepRunner(solver, inner, outer, on_device=True)
    state, step = solver.init(source.inner_params, source.outer_params), 0
    while step < 40:
        state, info = loop.run(state, step, 40)
        step += len(info.inner_loss)
    return task, solver, loop, state, source


def monitor(steps: int = 80, **settings: Any) -> health.Monitor:
    task, solver, loop, _, source = running()
    return health.Monitor(task, solver, loop, steps, source.outer_params, settings, grid=10)


def spent(plan: health.Plan, steps: int, units: float, minibatches: int) -> float:
    """Gradient units of the measurements during a run, from their definition."""
    probes = steps // plan.every
    probe = 4 * min(32, minibatches) + 4 * units
    checks = (steps - 1) // plan.check_every if plan.check_every else 0
    return probes * probe + checks * 4 * 3 * min(64, minibatches)


@pytest.mark.parametrize("steps", [20_000, 100_000, 1_000_000])
@pytest.mark.parametrize("minibatches", [16, 313, 5000])
@pytest.mark.parametrize("units", [1.75, 4.0, 8.0])
def test_the_measurements_cost_their_share_at_most(steps: int, minibatches: int, units: float):
    plan = health.plan(steps, units, minibatches, grid=100)
    assert plan.every % 100 == 0
    assert plan.check_every % plan.every == 0
    least = 4 * (4 * min(32, minibatches) + 4 * units)
    assert spent(plan, steps, units, minibatches) <= max(0.03 * steps * units, least)
    assert 4 <= steps // plan.every <= 10
    if steps >= 100_000:
        assert plan.check_every  # "every so often", where it can be afforded


def test_short_runs_are_measured_too_and_the_user_has_the_last_word():
    short = health.plan(40, 4.0, 47, grid=1)
    assert (short.every, short.check_every, short.last_iterations) == (10, 0, 10)
    assert health.plan(1000, 4.0, 47, every=7).every == 7
    assert health.plan(1000, 4.0, 47, every=0).every == 0
    assert health.plan(1000, 4.0, 47, share=0.0).every == 0
    for wrong in ({"share": 1.5}, {"every": -1}, {"every": 2.5}):
        with pytest.raises(ValueError, match=rf"health\.{next(iter(wrong))}="):
            health.plan(1000, 4.0, 47, **wrong)


def test_a_probe_measures_what_it_says_and_moves_nothing():
    task, solver, loop, state, source = running()
    watch = monitor()
    before = jax.tree.map(np.array, state)
    clocks = [getattr(loop, name) for name in StepRunner.CLOCKS]
    found = watch(state, 40)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, state))
    assert clocks == [getattr(loop, name) for name in StepRunner.CLOCKS]
    exact = diagnostics.adjoint_residual(task.problem, state.variables, task.inner, task.outer)
    assert found["adjoint_residual"] == pytest.approx(exact, rel=1e-3)
    assert found["health/negative_curvature"] == 0  # every A_i is positive definite
    # Four updates by hand, on the minibatches that come next.
    after, update = state, jax.jit(solver.update)
    ids = [sampler.ids(40, 44) for sampler in loop.samplers]
    for i, j in zip(*ids, strict=True):
        after, _ = update(after, source.batch(i, j))
    for name in ("inner", "adjoint", "outer"):
        old, new = (getattr(s.variables, name) for s in (state, after))
        moved = optax.tree.norm(optax.tree.sub(new, old)) / optax.tree.norm(old) / 4
        assert found[f"health/step_{name}"] == pytest.approx(float(moved), rel=1e-4)
    size = np.sqrt(np.mean(np.concatenate([np.ravel(a) for a in state.outer_params.values()]) ** 2))
    start = np.concatenate([np.ravel(a) for a in source.outer_params.values()])
    unit = max(1.0, np.sqrt(np.mean(start**2)))
    assert found["health/outer_size"] == pytest.approx(size / unit, rel=1e-5)
    assert found["health/loss_seen"] == found["health/loss_held_out"]  # the same data here
    mean = np.mean(
        [
            task.problem.outer_loss(
                state.inner_params, state.outer_params, source.batch(0, j).outer
            )
            for j in range(5)
        ]
    )
    assert found["health/loss_seen"] == pytest.approx(mean, rel=1e-5)


def test_negative_curvature_is_the_share_of_minibatches_that_bend_down_along_v():
    curvatures = np.array([[-1.0], [2.0], [3.0], [-4.0], [5.0]], np.float32)
    problem = bf.Problem(
        lambda z, x, batch: 0.5 * batch["a"].mean() * (z @ z) + 0.0 * x.sum(),
        lambda z, x, batch: z.sum() + 0.0 * batch["a"].mean(),
    )
    parts = data.partition({"a": curvatures}, 1)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(jnp.ones(2), jnp.ones(1)).replace(adjoint=jnp.ones(2))
    _, negative = diagnostics.probe_estimator(problem, parts, parts)(state)
    assert float(negative) == pytest.approx(2 / 5)


def test_the_last_check_is_part_of_the_last_probe():
    _, _, _, state, _ = running()
    watch = monitor(steps=40)
    assert watch.due(40)
    found = watch(state, 40)
    assert "health/step_inner" not in found  # the schedules are at their end
    assert 0.5 < found["hypergradient_cosine"] <= 1
    assert found["health/reference_residual"] < 1e-2
    assert 0.9 < found["health/smallest_curvature"] < found["health/largest_curvature"] < 4
    off = monitor(share=0.0)
    assert not off.due(40)
    assert not off.due(80)


HEALTHY = {
    "adjoint_residual": 0.4,
    "health/negative_curvature": 0.1,
    "health/step_inner": 0.01,
    "health/step_outer": 0.01,
    "health/outer_size": 2.0,
    "hypergradient_cosine": 0.99,
    "health/reference_residual": 0.01,
    "health/loss_seen": 1.0,
    "health/loss_held_out": 1.1,
    "health/loss_gap_error": 0.1,
}
ILL = {
    "adjoint_residual": {"adjoint_residual": 12.0},
    "negative_curvature": {"health/negative_curvature": 0.7},
    "inner_step": {"health/step_inner": 0.3},
    "outer_still": {"health/step_outer": 0.0},
    "outer_size": {"health/outer_size": 400.0},
    "hypergradient_cosine": {"hypergradient_cosine": -0.2},
    "memorisation": {"health/loss_held_out": 2.5},
}


def said(values: list[dict[str, float]], every: int = 100) -> list[tuple[int, str]]:
    """The warnings of a whole run, as the loop makes them."""
    rows: list[dict[str, Any]] = []
    found = []
    for i, one in enumerate(values, start=1):
        rows.append({"step": every * i, **one})
        for name, text in health_ranges.warnings(rows).items():
            rows.append({"step": every * i, health_ranges.PREFIX + name: text})
            found.append((every * i, name))
    return found


def test_a_healthy_run_is_left_alone_and_so_are_noise_and_missing_values():
    assert said([HEALTHY] * 10) == []
    once = [HEALTHY, HEALTHY | ILL["adjoint_residual"], HEALTHY] * 3
    assert said(once) == []
    assert said([{"inner_loss": 1.0}] * 5) == []
    # A reference that is not solved makes no cosine suspicious, a noisy gap none either.
    unsolved = {"hypergradient_cosine": -0.2, "health/reference_residual": 0.9}
    noisy = ILL["memorisation"] | {"health/loss_gap_error": 0.9}
    assert said([HEALTHY | unsolved | noisy] * 5) == []


@pytest.mark.parametrize("name", ILL)
def test_what_is_ill_is_said_and_not_too_often(name: str):
    assert {one.name for one in health_ranges.RANGES} == set(ILL)
    steps = [step for step, kind in said([HEALTHY | ILL[name]] * 32) if kind == name]
    assert {kind for _, kind in said([HEALTHY | ILL[name]] * 32)} == {name}
    assert steps[0] <= 200
    assert all(later >= 2 * earlier for earlier, later in zip(steps, steps[1:], strict=False))
    assert len(steps) >= 4


def test_the_words_hold_the_numbers_and_the_fix():
    rows = [{"step": s, **HEALTHY, **ILL["adjoint_residual"]} for s in (100, 200)]
    (text,) = health_ranges.warnings(rows).values()
    assert "adjoint residual 12" in text
    assert "lower the inner learning rate" in text


def test_the_report_shows_warnings_and_curves(tmp_path):
    rows = [{"step": 100 * i, **HEALTHY, "inner_loss": 1.0 / i} for i in range(1, 6)]
    section = health_report.section(rows)
    assert section is not None
    assert "No warnings" in section.html
    assert "cosine 0.9900" in section.html
    rows.append({"step": 500, "warning/inner_step": "z moves by <30%>"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(tmp_path).read_text()
    assert "z moves by &lt;30%&gt;" in text
    assert text.index("<h2>Curves") < text.index("<h2>Health") < text.index("z moves by")
    for title in ("Adjoint residual", "Step lengths, relative to z, v and x"):
        assert text.count(f"<h3>{title}</h3>") == 1
    assert health_report.section([{"step": 1, "inner_loss": 1.0}]) is None


@pytest.mark.parametrize("solver", ["soba", "amigo"])
def test_the_time_over_plain_training_is_measured_on_copies(solver: str):
    task, soba, loop, state, source = running()
    if solver == "amigo":  # several minibatches an update
        steps = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.01)}
        made = bf.amigo(source.problem, **steps, inner_steps=3, adjoint_steps=2)
        loop = StepRunner(made, task.inner, task.outer, on_device=True)
        state = made.init(source.inner_params, source.outer_params)
    before = jax.tree.map(np.array, state)
    times = step_time.over_plain(loop, task.problem, optax.sgd(0.1), state, rounds=2, seconds=0.01)
    assert all(0 < value < 1 for value in times)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, state))


def test_a_step_that_fails_has_no_time():
    task, _, loop, state, _ = running()
    broken = state.replace(inner_params=jax.tree.map(lambda z: z * jnp.nan, state.inner_params))
    times = step_time.over_plain(loop, task.problem, optax.sgd(0.1), broken, rounds=1)
    assert all(math.isnan(value) for value in times)


def test_what_the_summary_lacks_it_says():
    task, _, loop, state, _ = running()
    lines: list[str] = []

    def costs(config: dict, log: list[dict] | None = None) -> dict[str, float]:
        made = ml_collections.ConfigDict({"steps": 40, **config})
        totals = {"oracle_units": 170.0}
        return summary.costs(
            made, task.problem, state, loop, monitor(40), totals, log or [], lines.append
        )

    off = costs({"solver": {}, "health": {"summary": False}})
    assert off["gradient_units_per_step"] == 4.25  # full passes included
    assert math.isnan(off["step_seconds_over_plain"]) and math.isnan(off["hypergradient_cosine"])
    assert "not measured" in lines.pop()
    log = [{"step": 40, "hypergradient_cosine": 0.75, "health/reference_residual": 0.5}]
    taken = costs({"solver": {}}, log)
    assert taken["hypergradient_cosine"] == 0.75
    assert taken["hypergradient_reference_residual"] == 0.5
    assert "config.solver has no `inner`" in lines.pop()
    computed = costs({"solver": {}}, [{**log[0], "step": 39}])
    assert computed["hypergradient_cosine"] > 0.9
    idle = log[0] | {"hypergradient_cosine": "NaN"}
    assert math.isnan(costs({"solver": {}}, [idle])["hypergradient_cosine"])
    assert "hypergradient_cosine: none" in lines.pop()


def test_the_cost_line_names_the_passes_too():
    _, solver, _, _, source = running()
    assert summary.cost_line(solver) == "cost: 4 gradient units a step (plain training: 1)"
    steps = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1)}
    srba = bf.srba(source.problem, **steps, period=7, num_inner_batches=6, num_outer_batches=5)
    assert "each full pass" in summary.cost_line(srba)
