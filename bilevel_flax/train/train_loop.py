"""The host loop: it reads from top to bottom and knows no solver's name.

config -> task -> solver -> state -> metrics, checkpoints.

Every process runs all of it and takes the same branches; process 0 alone writes and prints. What
may differ between them (a signal, a clock, a disk) goes through a channel before it decides.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bilevel_flax import data, deprecated, oracles
from bilevel_flax.base import BilevelSolver, Info, TrainState
from bilevel_flax.checkpoints.best import BestCheckpoint
from bilevel_flax.checkpoints.checkpointer import Checkpointer
from bilevel_flax.sharding import Layout
from bilevel_flax.train import actions, multihost
from bilevel_flax.train import metrics as writers
from bilevel_flax.train.config import Config
from bilevel_flax.train.errors import (
    FiniteCheck,
    Interrupted,
    raise_if_diverged,
    raise_if_lost,
)
from bilevel_flax.train.health import domains
from bilevel_flax.train.health.monitor import Monitor
from bilevel_flax.train.health.thresholds import Watch
from bilevel_flax.train.heartbeat import Heartbeat
from bilevel_flax.train.metrics.progress_bar import Progress
from bilevel_flax.train.preemption import PreemptionGuard
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.start import initial, restore
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import Task
from bilevel_flax.train.whole_state import OnWholeState, gather_to_host
from bilevel_flax.train.workdir import write_json

# From a signal to the end of the process, whatever it waits for; a state that is large has longer
# to reach the disk, but a machine that is preempted is gone after 30 s.
_GRACE_SECONDS, _LEAVING_SECONDS = 7.0, 1.0
_MOST_SECONDS, _BYTES_A_SECOND = 28.0, 50e6


class Trained(NamedTuple):
    """What `train_loop` returns.

    Attributes:
        state: the last one.
        totals: of all sessions: `oracle_units`, `seconds`, `cpu_seconds` (of updates and
            refreshes) and `compile_seconds`.
        monitor: of the run's health.
        unsaved: why the last checkpoint was not written; None: it was.
        obstacle: what stops second derivatives, of which the diagnostics are made; "": nothing.
    """

    state: TrainState
    totals: dict[str, float]
    monitor: Monitor
    unsaved: str | None = None
    obstacle: str = ""


def train_loop(
    run: RunConfig | Config,
    workdir: Path,
    task: Task,
    solver: BilevelSolver,
    layout: Layout | None = None,
    metric_writers: Sequence[writers.MetricWriter] = (),
) -> Trained:
    """The loop itself: all steps from the newest checkpoint, or from the start.

    Args:
        run: the config, with `steps` as a number.
        workdir: gets the files.
        task: what to solve.
        solver: how.
        layout: of many devices (`setup.make_layout`); None: one device.
        metric_writers: further ones, with the methods of clu's `MetricWriter`; process 0 calls
            them, and closes them at the end.

    Raises:
        Diverged, Interrupted, CheckpointError: as `train_and_evaluate`.
    """
    run = RunConfig.read(run)
    processes = multihost.Channel("train")
    state, outer_params = initial(run, task, solver, layout)
    check = FiniteCheck(state)
    settings = {"seed": run.seed, "on_device": run.on_device, "layout": layout}
    runner = StepRunner(solver, task.inner, task.outer, paired=task.paired, **settings)
    messages: list[str] = []
    progress = Progress(run.steps, quiet=not processes.is_leader)
    # Traces only: nothing is compiled, but where a kernel and its reference are compared.
    minibatch = data.gather(task.inner, np.array(0))
    probe = oracles.probe(task.problem, gather_to_host(state), minibatch)
    obstacle = probe.stopped_by[task.problem.derivatives]
    monitor = Monitor(
        task,
        run.steps,
        outer_params,
        run.eval_every,
        0 if obstacle else run.health.every,
        units=solver.units,
        check_at_end=run.health.summary,
    )
    with (
        PreemptionGuard(grace_seconds=_GRACE_SECONDS) as guard,
        Checkpointer(
            workdir / "checkpoints",
            keep=run.checkpoint.keep,
            on_event=messages.append,
            required=run.checkpoint.required,
            processes=multihost.Channel("checkpoints"),
        ) as checkpointer,
    ):
        state, first, meta = restore(workdir, checkpointer, state, runner, check, messages)
        schedule = lambda every: actions.Schedule(every, run.steps)
        totals = actions.Totals(runner, meta.get("totals"))
        means = actions.StepMeans(schedule(run.log_every), totals, meta.get("window"))
        best, log = _open_files(run, workdir, task, first, metric_writers, progress, messages)
        evaluation = OnWholeState(
            actions.Evaluation(schedule(run.eval_every), task.evaluate, task.best_metric, best),
            processes,
        )
        saving = actions.Saving(
            schedule(run.checkpoint.every),
            checkpointer,
            processes,
            check,
            position=lambda: {
                "config": run.record,
                "samplers": [sampler.state() for sampler in runner.samplers],
                "window": means.saved(),
                "totals": totals.now(),
            },
        )
        measurements = (means, evaluation, monitor)
        step = first
        try:
            if step < run.steps:
                messages += [_cost_line(solver), _size_line(solver, task, runner)]
            if step == 0:
                messages.append(probe.message)
                if obstacle:
                    messages.append(f"no adjoint residual is measured: {obstacle} stops it")
                if wrong := monitor.first_check(state):
                    messages.append(f"warning: {wrong}")
            while step < run.steps:
                log.flush()
                refresh_at = int(solver.next_refresh(state))
                if refresh_at <= step:
                    state, units = runner.refresh(state)
                    totals.add_units(units)
                elif not runner.compiled:
                    with Heartbeat(progress.say, "compiling"):
                        runner.compile(state, step)
                    messages.append(f"compiled in {runner.compile_seconds:.1f} s")
                else:
                    stops = [each.schedule.next(step) for each in (*measurements, saving)]
                    state, info = runner.run(state, step, min(refresh_at, *stops))
                    step += _updates(info)
                    _raise_if_diverged(info, state, step, check, checkpointer)
                    means.add(info)
                    values: dict[str, float] = {}
                    for measure in measurements:
                        if measure.schedule.due(step):
                            values |= measure(state, step)
                    log.write(step, values)
                    log.show(step, values, (step - first) / max(runner.seconds, 1e-9))
                    if saving.schedule.due(step):
                        saving(state, step)
                received = _first_signal(processes, guard)
                if received is not None:
                    guard.extend(_seconds_to_save(state))
                    saving(state, step)
                    checkpointer.wait()
                    guard.extend(_LEAVING_SECONDS)
                    raise Interrupted(
                        f"{received.name}: saved at step {step}; the same command resumes", received
                    )
            unsaved = saving.finish()
        finally:
            log.close()
            runner.close()
    received = _first_signal(processes, guard)
    if received is not None:  # after the last step
        raise Interrupted(f"{received.name}: trained; the same command goes on", received)
    return Trained(state, totals.now(), monitor, unsaved, obstacle)


def _open_files(
    run: RunConfig,
    workdir: Path,
    task: Task,
    step: int,
    metric_writers: Sequence[writers.MetricWriter],
    progress: Progress,
    messages: list[str],
) -> tuple[BestCheckpoint | None, actions.MetricLog]:
    """Where process 0 keeps the best network and the values; the others keep nothing."""
    if not multihost.is_leader():
        return None, actions.MetricLog(writers.MultiWriter([]), Watch(), progress, messages)
    if step == 0:  # of a run that ended before its first checkpoint
        (workdir / "best.npz").unlink(missing_ok=True)
    write_json(workdir / "config.json", run.record)
    write_json(workdir / "units.json", task.units)
    writer = writers.open_writers(workdir, step, metric_writers, messages.append)
    watch = Watch(writers.read_metrics(workdir / "metrics.jsonl"), domains.warnings_of(task))
    best = BestCheckpoint(workdir / "best.npz", on_event=messages.append)
    return best, actions.MetricLog(writer, watch, progress, messages)


def _updates(info: Info) -> int:
    """How many updates of a chunk took place: one that is not finite ends it and moves nothing."""
    return len(info.inner_loss) - (not all(side[-1] for side in info.finite))


def _raise_if_diverged(
    info: Info, state: TrainState, step: int, check: FiniteCheck, checkpointer: Checkpointer
) -> None:
    if all(info.ok[-1:]):
        return
    saved = checkpointer.latest_step()
    # A NaN that an optimiser left in the state is the cause; the directions only show it.
    raise_if_lost(check.first_lost(state), step, saved)
    raise_if_diverged(info, step, saved)


def _seconds_to_save(state: TrainState) -> float:
    sizes = (leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
    return min(sum(sizes) / multihost.process_count() / _BYTES_A_SECOND, _MOST_SECONDS)


def _first_signal(processes: multihost.Channel, guard: PreemptionGuard) -> signal.Signals | None:
    """The signal that a process has received: one of them is enough, and all act on it."""
    received = [number for number in processes.all_gather(guard.received) if number is not None]
    return signal.Signals(received[0]) if received else None


def _cost_line(solver: BilevelSolver) -> str:
    line = f"cost: {solver.units:g} gradient units a step (plain training: 1)"
    inner, outer = solver.refresh_units
    if inner or outer:
        line += f"; each full pass {inner:g} an inner and {outer:g} an outer minibatch"
    return line


def _size_line(solver: BilevelSolver, task: Task, runner: StepRunner) -> str:
    sides = " + ".join(str(side.num_samples) for side in (task.inner, task.outer))
    where = "on the device" if runner.on_device else "streamed"
    return (
        f"{solver.name}: {sides} examples, batches of {task.inner.batch_size}, data {where}; "
        "compiling"
    )


__getattr__ = deprecated.names(__name__)
