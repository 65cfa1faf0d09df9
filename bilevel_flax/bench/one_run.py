"""One run of one method with one pair of steps, measured as it goes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bilevel_flax.base import BilevelSolver
from bilevel_flax.bench import methods
from bilevel_flax.bench.options import CLOCKS
from bilevel_flax.bench.results import DIVERGED, FINISHED, Key, Row
from bilevel_flax.bench.tasks import BenchTask
from bilevel_flax.config import ConfigError
from bilevel_flax.loop import Loop

_EVALUATIONS = 40  # of a run, at times spaced evenly in their logarithm
_FIRST_EVALUATION = 1 / 500  # of the budget
_CHUNK_STEPS = 4000


def run_one(
    bench_task: BenchTask, key: Key, pair: tuple[float, float], seconds: float, clock: str
) -> list[Row]:
    """One run, measured at times spaced evenly in their logarithm.

    Args:
        bench_task: the task, made for the run's seed.
        key: solver, seed and params.
        pair: (ρ, ρ/γ).
        seconds: the budget.
        clock: "wall" or "cpu".

    Returns:
        Its rows; the last one has a status. Once diverged, its values are NaN.

    Raises:
        ConfigError: the budget is over before the first step.
    """
    task, name = bench_task.task, CLOCKS[clock]
    solver = methods.build(key.solver, bench_task, *pair)
    init_rng, run_rng = jax.random.split(jax.random.PRNGKey(key.seed))
    start = task.init(init_rng)
    state = solver.init(
        start.inner_params, start.outer_params, model_state=start.model_state, rng=run_rng
    )
    loop = Loop(
        solver,
        task.inner,
        task.outer,
        seed=key.seed,
        capacity=_CHUNK_STEPS,
        target_seconds=min(0.1, seconds / 100),
    )
    try:
        return list(_rows(bench_task, key, solver, loop, state, seconds, name))
    finally:
        loop.close()


def _rows(
    bench_task: BenchTask,
    key: Key,
    solver: BilevelSolver,
    loop: Loop,
    state: Any,
    seconds: float,
    clock: str,
) -> Iterator[Row]:
    step, units = 0, 0.0

    def row(status: str = "") -> Row:
        nothing = (math.nan,) * 3
        found = nothing if status == DIVERGED else bench_task.measure(state)
        if not all(map(math.isfinite, found)):
            status, found = DIVERGED, nothing
        value, gap, validation = map(float, found)
        spent = (loop.seconds, loop.cpu_seconds, units)
        return Row(bench_task.name, *key, step, *spent, value, gap, validation, status)

    yield row()
    times = iter(np.geomspace(seconds * _FIRST_EVALUATION, seconds, _EVALUATIONS)[:-1])
    due = next(times)
    while getattr(loop, clock) < seconds:
        refresh_step = int(solver.next_refresh(state))
        if refresh_step <= step:
            state, spent = loop.refresh(state)
            units += spent
        else:
            state, info = loop.run(state, step, refresh_step)
            alive = all(bool(side[-1]) for side in info.finite)
            step += len(info.inner_loss) - (not alive)
            units += float(np.sum(info.oracle_units, dtype=np.float64))
            if not alive:
                yield row(DIVERGED)
                return
        if step and due <= getattr(loop, clock) < seconds:
            found = row()
            yield found
            if found.status:
                return
            while due <= getattr(loop, clock):
                due = next(times, math.inf)
    if step == 0 or (step == 1 and getattr(loop, clock) > seconds):
        raise ConfigError(
            f"--seconds={seconds:g}: {key.solver} took {getattr(loop, clock):.3g} s and did not "
            "finish its first step within the budget (full passes count); give more seconds"
        )
    yield row(FINISHED)
