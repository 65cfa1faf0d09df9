"""What a run does beside its updates, now and then; each action knows when it is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bilevel_flax.base import Info, TrainState
from bilevel_flax.checkpoints.best import BestCheckpoint
from bilevel_flax.checkpoints.checkpointer import Checkpointer, CheckpointError
from bilevel_flax.train.errors import FiniteCheck, raise_if_lost
from bilevel_flax.train.health import thresholds
from bilevel_flax.train.metrics import MetricWriter, as_scalars
from bilevel_flax.train.metrics.accumulator import MetricAccumulator
from bilevel_flax.train.metrics.progress_bar import Progress
from bilevel_flax.train.multihost import Channel
from bilevel_flax.train.step_runner import StepRunner


class Schedule(NamedTuple):
    """Steps at which something is due.

    Attributes:
        every: steps between two of them; 0: never.
        last: the run's last step, at which all of it is due.

    Example:
        >>> schedule = Schedule(every=10, last=25)
        >>> [step for step in range(1, 26) if schedule.due(step)], schedule.next(10)
        ([10, 20, 25], 20)
    """

    every: int
    last: int

    def due(self, step: int) -> bool:
        """Whether it is due after `step` steps."""
        return bool(self.every) and (step % self.every == 0 or step == self.last)

    def next(self, step: int) -> int:
        """The first step after `step` at which it is due."""
        return min(self.last, step + self.every - step % self.every) if self.every else self.last


class Totals:
    """What all sessions of a run have spent: gradient units, and the runner's clocks.

    Args:
        runner: whose clocks count.
        saved: of earlier sessions, from `now`.
    """

    def __init__(self, runner: StepRunner, saved: Mapping[str, float] | None = None):
        self._runner = runner
        self._before = dict.fromkeys(("oracle_units", *runner.CLOCKS), 0.0) | dict(saved or {})

    def add_units(self, units: float) -> None:
        """Counts gradient units."""
        self._before["oracle_units"] += units

    def now(self) -> dict[str, float]:
        """`oracle_units`, `seconds`, `cpu_seconds`, `compile_seconds`, up to this moment."""
        session = {name: getattr(self._runner, name) for name in self._runner.CLOCKS}
        return {name: total + session.get(name, 0.0) for name, total in self._before.items()}


class StepMeans:
    """Means of what every update says of itself (losses, norms, the user's metrics).

    Args:
        schedule: when they are logged, and begun anew.
        totals: for the gradient units beside them.
        saved: an interval that an earlier session began, from `saved`.
    """

    def __init__(self, schedule: Schedule, totals: Totals, saved: Mapping[str, Any] | None = None):
        self.schedule, self._totals = schedule, totals
        self._means = MetricAccumulator(**(saved or {}))

    def add(self, info: Info) -> None:
        """Adds a chunk of updates, leaves [updates]."""
        self._totals.add_units(float(np.sum(info.oracle_units, dtype=np.float64)))
        self._means.add(info)

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """The means since the last call."""
        del state, step
        means, self._means = self._means.means(), MetricAccumulator()
        return means | {"oracle_units": self._totals.now()["oracle_units"]}

    def saved(self) -> dict[str, Any]:
        """What an interrupted interval goes on from, fit for JSON."""
        return self._means.state()


class Evaluation:
    """Calls a task's `evaluate`, and keeps the network from where its best metric was lowest.

    Args:
        schedule: when.
        evaluate: the task's, of a state that is whole on this process.
        best_metric: the name of the value that should be low; None: nothing is kept.
        best: where the network is kept; None: on this process it is not.
    """

    def __init__(
        self,
        schedule: Schedule,
        evaluate: Callable[[TrainState], Any],
        best_metric: str | None,
        best: BestCheckpoint | None,
    ):
        self.schedule = schedule
        self._evaluate, self._best_metric, self._best = evaluate, best_metric, best

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """The task's values by name.

        Raises:
            ValueError: the best metric is none of them.
        """
        values = as_scalars(self._evaluate(state))
        if self._best_metric is not None:
            if self._best_metric not in values:
                raise ValueError(
                    f"best_metric={self._best_metric!r} is none of what evaluate returns "
                    f"({', '.join(values) or 'nothing'})"
                )
            if self._best is not None:
                network = (state.inner_params, state.model_state)
                self._best.maybe_save(step, values[self._best_metric], network)
        return values


class Saving:
    """Saves the state, after a look whether all of it is finite.

    Args:
        schedule: when.
        checkpointer: of all processes.
        processes: of all processes; what the disk says goes through it before it decides.
        check: what finds a NaN.
        position: where the run stands beside its state, fit for JSON: what a resumed run goes on
            from.
    """

    def __init__(
        self,
        schedule: Schedule,
        checkpointer: Checkpointer,
        processes: Channel,
        check: FiniteCheck,
        position: Callable[[], Mapping[str, Any]],
    ):
        self.schedule = schedule
        self._checkpointer, self._processes, self._check = checkpointer, processes, check
        self._position = position
        self._unsaved: str | None = None

    def __call__(self, state: TrainState, step: int) -> None:
        """Saves unless this step is saved already.

        Raises:
            Diverged: a leaf is not finite. No checkpoint holds it then.
            CheckpointError: the first checkpoint of the session could not be written, and there are
                steps to come.
        """
        latest = self._processes.broadcast(self._checkpointer.latest_step())
        if latest == step:
            return
        raise_if_lost(self._check.first_lost(state), step, latest)
        try:
            self._checkpointer.save(step, state, self._position())
        except CheckpointError as error:
            if step < self.schedule.last:
                raise CheckpointError(
                    f"{error} It is the first one, so the run ends here; make room, or train on "
                    "without: --config.checkpoint.required=False"
                ) from error
            self._unsaved = str(error)

    def finish(self) -> str | None:
        """Waits for the last one; says what went wrong with it. The run itself is done."""
        try:
            self._checkpointer.wait()
        except CheckpointError as error:
            return str(error)
        return self._unsaved


class MetricLog:
    """Values to files and to the person who waits, with a warning where one is out of range.

    Args:
        writer: of the files.
        watch: of the ranges; it has read the lines that are there already.
        progress: the bar, or lines.
        messages: lines that wait to be printed.
    """

    def __init__(
        self,
        writer: MetricWriter,
        watch: thresholds.Watch,
        progress: Progress,
        messages: list[str],
    ):
        self._writer, self._watch, self._progress = writer, watch, progress
        self.messages = messages

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line, if there are values."""
        if not values:
            return
        self._writer.write_scalars(step, values)
        texts = self._watch({"step": step, **values})
        if texts:
            self.messages += [f"step {step}: warning: {text}" for text in texts.values()]
            named = {thresholds.PREFIX + name: text for name, text in texts.items()}
            self._writer.write_texts(step, named)

    def show(self, step: int, values: Mapping[str, float], pace: float | None) -> None:
        """Moves the bar."""
        shown = {name: value for name, value in values.items() if not _is_hidden(name)}
        self._progress.update(step, shown, pace)

    def flush(self) -> None:
        """Prints the lines that wait; they come from other threads too."""
        while self.messages:
            self._progress.say(self.messages.pop(0))

    def close(self) -> None:
        """Closes files and bar."""
        self._writer.close()
        self.flush()
        self._progress.close()


def _is_hidden(name: str) -> bool:
    """Whether a value is for the files only; a line on a terminal holds few."""
    return name.startswith(("norm_", "health/", "_")) or name == "oracle_units"
