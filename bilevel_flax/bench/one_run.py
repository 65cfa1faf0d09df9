"""One run of one method with one pair of steps, measured as it goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from bilevel_flax.base import BilevelSolver, PyTree, TrainState
from bilevel_flax.bench.results import DIVERGED, FINISHED, Key, Row
from bilevel_flax.bench.tasks import BenchTask
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.step_runner import StepRunner

_FIRST_EVALUATION = 1 / 500  # of the budget


@dataclasses.dataclass
class Run:
    """What a run needs, and its rows.

    Attributes:
        bench_task: the task, made for the run's seed.
        key: solver, seed and params.
        ratio: ρ / γ.
        solver: the method with its steps.
        runner: at its beginning; its clocks are the run's.
        start: `start(x) -> TrainState`, with z as the task starts it.
        outer_params: x as the task starts it.
        seconds: the budget.
        clock: what it is counted in, "seconds" or "cpu_seconds".
        evaluations: how often to measure, at times spaced evenly in their logarithm.
        end: status of the last row.
        step: updates so far.
        units: oracle units so far.
    """

    bench_task: BenchTask
    key: Key
    ratio: float
    solver: BilevelSolver
    runner: StepRunner
    start: Callable[[PyTree], TrainState]
    outer_params: PyTree
    seconds: float
    clock: str
    evaluations: int
    end: str = FINISHED
    step: int = 0
    units: float = 0.0

    def __post_init__(self):
        first = self.seconds * _FIRST_EVALUATION
        self._times = iter(np.geomspace(first, self.seconds, self.evaluations)[:-1])
        self._due = next(self._times, math.inf)

    @property
    def spent(self) -> float:
        """Seconds of the budget."""
        return getattr(self.runner, self.clock)

    def row(self, state: TrainState, status: str = "") -> Row:
        """Measures; a value that is not finite makes the row the run's last."""
        value, validation = math.nan, math.nan
        if status != DIVERGED:
            value, validation = map(float, self.bench_task.measure(state))
        if not (math.isfinite(value) and math.isfinite(validation)):
            status, value, validation = DIVERGED, math.nan, math.nan
        gap = value - self.bench_task.best()
        spent = (self.runner.seconds, self.runner.cpu_seconds, self.units)
        name = self.bench_task.name
        return Row(name, *self.key, self.step, *spent, value, gap, validation, status)

    def is_due(self) -> bool:
        """Whether to measure now; asked once, the time is past."""
        spent = self.spent
        if not (self.step and self._due <= spent < self.seconds):
            return False
        while self._due <= spent:
            self._due = next(self._times, math.inf)
        return True

    def advance(self, state: TrainState, start: int, stop: int) -> tuple[TrainState, int, bool]:
        """One chunk of updates.

        Args:
            state: donated.
            start: `int(state.step)`.
            stop: the chunk ends there at the latest.

        Returns:
            The state, the updates taken, and whether all directions were finite.
        """
        state, info = self.runner.run(state, start, stop)
        finite = all(bool(side[-1]) for side in info.finite)
        taken = len(info.inner_loss) - (not finite)
        self.step += taken
        self.units += float(np.sum(info.oracle_units, dtype=np.float64))
        return state, taken, finite

    def too_short(self) -> ConfigError:
        """What to raise where the budget is over before the first step."""
        return ConfigError(
            f"--seconds={self.seconds:g}: {self.key.solver} took {self.spent:.3g} s and did not "
            "finish its first step within the budget (full passes count); give more seconds"
        )


def walk(run: Run) -> Iterator[Row]:
    """The rows of a method's run; the last one has a status.

    Raises:
        ConfigError: the budget is over before the first step.
    """
    state = run.start(run.outer_params)
    yield run.row(state)
    while run.spent < run.seconds:
        refresh_step = int(run.solver.next_refresh(state))
        if refresh_step <= run.step:
            state, units = run.runner.refresh(state)
            run.units += units
        else:
            state, _, finite = run.advance(state, run.step, refresh_step)
            if not finite:
                yield run.row(state, DIVERGED)
                return
        if run.is_due():
            row = run.row(state)
            yield row
            if row.status:
                return
    if run.step == 0 or (run.step == 1 and run.spent > run.seconds):
        raise run.too_short()
    yield run.row(state, run.end)
