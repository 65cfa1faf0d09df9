"""A run's health: what is measured, when, what it costs, and the words for what is not healthy."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tiny_task
from problems import finite_sums, quadratics

import bilevel_flax as bf
from bilevel_flax import data, diagnostics
from bilevel_flax.train.experiment import train_and_evaluate
from bilevel_flax.train.health import domains, thresholds
from bilevel_flax.train.health import monitor as health
from bilevel_flax.train.report import health as report_health
from bilevel_flax.train.report.page import write_report
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import InitialValues, Task
from bilevel_flax.train.train_loop import train_loop


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


def monitor(steps: int = 80, every: int | None = None, **more: Any) -> health.Monitor:
    task, _, _, _, source = running()
    return health.Monitor(task, steps, source.outer_params, 10, every, **more)


@pytest.mark.parametrize("steps", [7, 40, 1000, 20_001, 10**6])
@pytest.mark.parametrize("units", [1.0, 4.0, 40.0])
def test_probes_take_three_percent_of_a_run_ten_at_most_and_the_end_is_measured(steps, units):
    watch = monitor(steps, units=units)
    assert watch.schedule.every % 10 == 0
    assert watch.schedule.due(steps)
    probes = -(-steps // watch.schedule.every)
    cost = 6 * 3 + 5 + (5 + 5) / 3  # products on 6 minibatches, gradients on 5, two values on 5
    assert 1 <= probes <= 10
    assert probes == 1 or probes * cost <= 0.03 * steps * units
    # Nothing that is affordable is left out, but for rounding to evaluations.
    affordable = min(0.03 * steps * units / cost, steps / 10, 10)
    assert probes >= 0.5 * affordable


def test_a_check_of_the_hypergradient_is_part_of_every_probe_where_that_is_affordable():
    _, _, _, state, _ = running()
    short, long = monitor(10_000), monitor(100_000)
    # 10 checks: 6 minibatches, 4 products, the start's residual and two points; 5 with 2 gradients.
    assert 0.03 * 4 * 10_000 < 10 * (3 * 6 * 7 + 2 * 5) < 0.03 * 4 * 100_000
    assert "hypergradient_cosine" not in short(state, 10)
    assert "hypergradient_cosine" in long(state, 10)


def test_without_the_summary_s_check_the_last_probe_has_none():
    _, _, _, state, _ = running()
    values = monitor(40, check_at_end=False)(state, 40)
    assert "adjoint_residual" in values
    assert "hypergradient_cosine" not in values


def test_the_user_has_the_last_word_on_how_often():
    assert monitor(1000, every=7).schedule.every == 7
    assert not monitor(40, every=0).schedule.due(40)


def test_a_probe_measures_what_it_says_and_moves_nothing():
    task, _, loop, state, source = running()
    watch = monitor()
    before = jax.tree.map(np.array, state)
    clocks = [getattr(loop, name) for name in StepRunner.CLOCKS]
    values = watch(state, 40)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, state))
    assert clocks == [getattr(loop, name) for name in StepRunner.CLOCKS]
    exact = diagnostics.adjoint_residual(task.problem, state.variables, task.inner, task.outer)
    assert values["adjoint_residual"] == pytest.approx(exact, rel=1e-3)
    assert values["health/negative_curvature"] == 0  # every A_i is positive definite
    size = np.sqrt(np.mean(np.concatenate([np.ravel(a) for a in state.outer_params.values()]) ** 2))
    start = np.concatenate([np.ravel(a) for a in source.outer_params.values()])
    unit = max(1.0, np.sqrt(np.mean(start**2)))
    assert values["health/outer_size"] == pytest.approx(size / unit, rel=1e-5)
    assert values["health/loss_seen"] == values["health/loss_held_out"]  # the same data here
    mean = np.mean(
        [
            task.problem.outer_loss(
                state.inner_params, state.outer_params, source.batch(0, j).outer
            )
            for j in range(5)
        ]
    )
    assert values["health/loss_seen"] == pytest.approx(mean, rel=1e-5)


def test_a_residual_below_its_own_noise_is_left_out_and_not_printed_as_zero(monkeypatch):
    monkeypatch.setattr(diagnostics, "probe_estimator", lambda *_: lambda state: (0.0, 0.0))
    _, _, _, state, _ = running()
    assert "adjoint_residual" not in monitor()(state, 40)


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
    values = watch(state, 40)
    assert 0.5 < values["hypergradient_cosine"] <= 1
    assert values["health/reference_residual"] < 1e-2
    assert 0.9 < values["health/smallest_curvature"] < values["health/largest_curvature"] < 4


HEALTHY = {
    "adjoint_residual": 0.4,
    "health/negative_curvature": 0.1,
    "hypergradient_cosine": 0.99,
    "health/reference_residual": 0.01,
    "health/loss_seen": 1.0,
    "health/loss_held_out": 1.1,
    "health/loss_gap_error": 0.1,
}
ILL = {
    "adjoint_residual": {"adjoint_residual": 12.0},
    "negative_curvature": {"health/negative_curvature": 0.7},
    "outer_size": {"health/outer_size": 400.0},
    "outer_still": {"moves": 0.0},
    "hypergradient_cosine": {"hypergradient_cosine": -0.2},
    "memorisation": {"health/loss_held_out": 2.5},
}


def run_of(probes: list[dict[str, float]], every: int = 100) -> list[dict[str, Any]]:
    """Lines of a run; x moves a little from probe to probe, unless `moves` says otherwise."""
    rows = []
    for i, values in enumerate(probes, start=1):
        size = {"health/outer_size": 2.0} | values
        size["health/outer_size"] += size.pop("moves", 1e-3) * i
        rows.append({"step": every * i, **size})
    return rows


def warned(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The warnings of a whole run, as the loop makes them."""
    watch = thresholds.Watch()
    return [(row["step"], name) for row in rows for name in watch(row)]


def test_a_healthy_run_is_left_alone_and_so_are_noise_and_missing_values():
    assert warned(run_of([HEALTHY] * 10)) == []
    once = [HEALTHY, HEALTHY | ILL["adjoint_residual"], HEALTHY] * 3
    assert warned(run_of(once)) == []
    assert warned([{"step": i, "inner_loss": 1.0} for i in range(5)]) == []
    # A reference that is not solved makes no cosine suspicious, a noisy gap none either.
    unsolved = {"hypergradient_cosine": -0.2, "health/reference_residual": 0.9}
    noisy = ILL["memorisation"] | {"health/loss_gap_error": 0.9}
    assert warned(run_of([HEALTHY | unsolved | noisy] * 5)) == []


@pytest.mark.parametrize("name", ILL)
def test_what_is_ill_is_said_and_not_too_often(name: str):
    assert {one.name for one in thresholds.RANGES} == set(ILL)
    warnings = warned(run_of([HEALTHY | ILL[name]] * 32))
    assert {kind for _, kind in warnings} == {name}
    steps = [step for step, _ in warnings]
    assert steps[0] <= 200
    assert all(later >= 2 * earlier for earlier, later in zip(steps, steps[1:], strict=False))
    assert len(steps) >= 4


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_resumed_run_gives_the_warnings_of_an_uninterrupted_one(cut: int):
    rows = run_of([HEALTHY | ILL["adjoint_residual"] | ILL["outer_size"]] * 16)
    # The file, with the warnings in it.
    watch, lines = thresholds.Watch(), []
    for row in rows:
        lines.append(row)
        texts = watch(row)
        lines += [{"step": row["step"], thresholds.PREFIX + k: v} for k, v in texts.items()]
    until = rows[cut - 1]["step"]
    resumed = thresholds.Watch([line for line in lines if line["step"] <= until])
    again = [(row["step"], name) for row in rows[cut:] for name in resumed(row)]
    assert again == [(step, name) for step, name in warned(rows) if step > until]


def test_a_domain_that_never_occurs_stands_still_and_the_log_says_so(tmp_path: Path):
    def task_of(domain):
        mixture = bf.outer.domain_weights(3, reference=(1, 1, 0))
        losses = lambda z, batch: (z - batch["y"]) ** 2
        problem = bf.Problem(
            lambda z, x, batch: (mixture.weights(x, batch) * losses(z, batch)).mean(),
            lambda z, x, batch: losses(z, batch).mean(),
        )
        rows = {"y": np.linspace(0, 1, 16, dtype=np.float32), "domain": domain}
        parts = bf.data.partition(rows, 8)
        init = lambda rng: InitialValues(jnp.zeros(()), mixture.init())
        return Task(problem, init, parts, parts, domains=["a", "b", "c"])

    assert domains.warnings_of(task_of(np.arange(16) % 3)) == {}
    task = task_of(np.arange(16) % 2)
    solver = bf.soba(task.problem, inner=optax.sgd(0.1), outer=optax.sgd(0.5))
    config = ml_collections.ConfigDict(
        {"name": "domains", "task": {}, "solver": {}, "steps": 8, "log_every": 2, "eval_every": 8}
    )
    config.health = {"every": 0, "summary": False}
    trained = train_loop(config, tmp_path, task, solver)
    x = np.asarray(trained.state.outer_params)
    assert x[2] == 0 and x[0] != 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    name = "warning/absent_domains"
    said = [(row["step"], row[name]) for row in rows if name in row]
    assert [step for step, _ in said] == [2, 4, 8]
    assert "no minibatch holds an example of c:" in said[0][1]


def test_a_line_costs_the_same_however_long_the_run_has_been():
    class Counted(dict):
        reads = 0

        def __contains__(self, key):
            Counted.reads += 1
            return super().__contains__(key)

    watch = thresholds.Watch()

    def reads(count: int) -> int:
        Counted.reads = 0
        for row in run_of([HEALTHY] * count):
            watch(Counted(row))
        return Counted.reads

    assert reads(1000) == 10 * reads(100)


def test_the_words_hold_the_numbers_and_the_fix():
    watch = thresholds.Watch()
    for row in run_of([HEALTHY | ILL["adjoint_residual"]] * 2):
        texts = watch(row)
    assert "adjoint residual 12" in texts["adjoint_residual"]
    assert "lower the inner learning rate" in texts["adjoint_residual"]


def words_on(probes: list[dict[str, float]], **summary: Any) -> str:
    return report_health.in_words(run_of(probes), summary)


def test_good_news_is_only_told_where_nothing_is_bad():
    assert "No warnings: at its last probe every measurement" in words_on([HEALTHY] * 5)
    for name, values in ILL.items():
        if name == "outer_still":  # takes two probes, so it is a warning of the run
            continue
        text = words_on([HEALTHY] * 4 + [HEALTHY | values])  # once: no warning in the run itself
        assert "No warnings" not in text, name
        assert "at the last probe" in text, name
    # A hypergradient that was not judged is no healthy one.
    for unjudged in ({"health/reference_residual": 0.4}, {"hypergradient_cosine": math.nan}):
        text = words_on([HEALTHY | unjudged] * 5)
        assert "every measurement" not in text
        assert "no proof of health" in text


@pytest.mark.parametrize(
    ("residual", "words"),
    [
        (0.014, "v solves its system well"),
        (0.42, "v solves its system roughly"),
        (0.7, "v solves its system poorly"),
        (0.97, "v is no better than v = 0"),
        (12.0, "v is worse than v = 0"),
    ],
)
def test_the_report_says_what_a_residual_means(residual: float, words: str):
    text = words_on([HEALTHY | {"adjoint_residual": residual}] * 3)
    assert f"{residual:.2g}" in text
    assert "0 is the exact adjoint, 1 is what v = 0 gives" in text
    assert words in text
    assert ("No warnings" in text) == (residual < 0.9)
    # The summary's, over all of the data, is the better one.
    assert words in words_on([HEALTHY | {"adjoint_residual": 0.2}] * 3, adjoint_residual=residual)


def test_the_report_shows_warnings_and_curves(tmp_path):
    rows = run_of([HEALTHY | {"inner_loss": 1.0 / i} for i in range(1, 6)])
    rows.append({"step": 500, "warning/outer_size": "x grew by <30%>"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(tmp_path).read_text()
    assert "x grew by &lt;30%&gt;" in text
    assert "cosine 0.9900" in text
    assert text.index("<h2>Curves") < text.index("<h2>Health") < text.index("x grew by")
    for title in ("Adjoint residual", "Size of x, relative to its start"):
        assert text.count(f"<h3>{title}</h3>") == 1
    assert report_health.section([{"step": 1, "inner_loss": 1.0}]) is None


@pytest.mark.parametrize("health, said", [({"every": 20, "summary": False}, True), (None, False)])
def test_a_run_begins_with_what_is_wrong_with_its_inner_gradient(health, said, tmp_path, capsys):
    config = tiny_task.get_config(task={"call": "tiny_task:make_task_with_a_stopped_target"})
    if health is not None:
        config.health = health
    train_and_evaluate(config, tmp_path)
    line = "warning: the inner problem holds a stop_gradient"
    assert (line in capsys.readouterr().err) == said


def test_a_run_says_at_its_start_which_derivatives_can_be_had_and_not_again(tmp_path, capsys):
    config = tiny_task.get_config(
        task={"call": "tiny_task:make_task_with_a_kernel"},
        solver={
            "call": "bilevel_flax:first_order",
            "inner": {"call": "optax:sgd", "learning_rate": 0.1},
            "steps": 20,
        },
    )
    train_and_evaluate(config, tmp_path)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "derivatives" in line)
    assert "first_order work; stopped are forward_over_reverse by jax.custom_vjp 'square'" in line
    assert "(the primitive pure_callback)" in line
    (tmp_path / "summary.json").unlink()  # resumed from its last checkpoint
    train_and_evaluate(config, tmp_path)
    assert "derivatives" not in capsys.readouterr().err
