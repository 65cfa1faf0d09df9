"""The host loop: it reads from top to bottom and knows no solver's name.

config -> task -> solver -> state -> metrics, checkpoints.

Every process runs all of it and takes the same branches; process 0 alone writes and prints. What
may differ between them (a signal, a clock, a disk) goes through a channel before it decides.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_flax import deprecated
from bilevel_flax.base import BilevelSolver, TrainState
from bilevel_flax.checkpoints import checkpointer as checkpoint
from bilevel_flax.checkpoints.best import BestCheckpoint
from bilevel_flax.sharding import Layout
from bilevel_flax.train import config as configs
from bilevel_flax.train import metrics as writers
from bilevel_flax.train import multihost as distributed
from bilevel_flax.train import summary
from bilevel_flax.train import workdir as workdirs
from bilevel_flax.train.errors import Interrupted, raise_if_diverged
from bilevel_flax.train.health import monitor as health
from bilevel_flax.train.health import thresholds as health_ranges
from bilevel_flax.train.metrics.accumulator import MetricAccumulator
from bilevel_flax.train.metrics.progress_bar import Progress
from bilevel_flax.train.preemption import PreemptionGuard
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import Task


class Trained(NamedTuple):
    """What `train` returns.

    Attributes:
        state: the last one.
        totals: of all sessions: `oracle_units`, `seconds`, `cpu_seconds` (of updates and
            refreshes) and `compile_seconds`.
        loop: whose compiled chunk may be used again; close it.
        monitor: of the run's health.
    """

    state: TrainState
    totals: dict[str, float]
    loop: StepRunner
    monitor: health.Monitor


def train_loop(
    config: configs.Config,
    workdir: Path,
    task: Task,
    solver: BilevelSolver,
    record: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    metric_writers: Sequence[writers.MetricWriter] = (),
) -> Trained:
    """The loop itself: all steps from the newest checkpoint, or from the start.

    Args:
        config: as for `train_and_evaluate`.
        workdir: gets the files.
        task: what to solve.
        solver: how.
        record: the config as the user gave it, for `config.json` and the checkpoints; None: as
            `config` is now.
        layout: of many devices (`run_mesh.make_layout`); None: one device.
        metric_writers: further ones, with the methods of clu's `MetricWriter`; process 0 calls
            them, and closes them at the end.

    Raises:
        Diverged, Interrupted, CheckpointError: as `train_and_evaluate`.
    """
    record = configs.plain(config) if record is None else record
    processes, leads = distributed.Channel("train"), distributed.is_leader()
    init_rng, run_rng = jax.random.split(jax.random.PRNGKey(config.seed))
    start = task.init(init_rng)
    state = solver.init(
        start.inner_params, start.outer_params, model_state=start.model_state, rng=run_rng
    )
    if layout is not None:
        state = layout.place_state(state)
    loop = StepRunner(
        solver,
        task.inner,
        task.outer,
        seed=config.seed,
        on_device=config.on_device,
        layout=layout,
    )
    step, window = 0, MetricAccumulator()
    totals = dict.fromkeys(("oracle_units", *StepRunner.CLOCKS), 0.0)
    progress = Progress(config.steps, quiet=not leads)
    messages: list[str] = []
    monitor = health.Monitor(
        task,
        config.steps,
        start.outer_params,
        config.eval_every,
        config.get("health") or {},
        messages.append,
    )
    with (
        checkpoint.Checkpointer(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            on_event=messages.append,
            processes=distributed.Channel("checkpoints"),
        ) as checkpointer,
        PreemptionGuard() as guard,
    ):
        restored = checkpointer.restore(state)
        if restored is not None:
            state, step = restored.state, restored.step
            for sampler, saved in zip(loop.samplers, restored.meta["samplers"], strict=True):
                sampler.check(saved)
            window, totals = MetricAccumulator(**restored.meta["window"]), restored.meta["totals"]
            messages.append(f"resuming {workdir} at step {step}")
        if step == 0 and leads:  # of a run that ended before its first checkpoint
            (workdir / "best.npz").unlink(missing_ok=True)
        best = BestCheckpoint(workdir / "best.npz")
        writer, watch = writers.MultiWriter([]), health_ranges.Watch()
        if leads:
            workdirs.write_json(workdir / "config.json", record)
            workdirs.write_json(workdir / "units.json", task.units)
            writer = writers.open_writers(workdir, step, metric_writers, messages.append)
            watch = health_ranges.Watch(writers.read_metrics(workdir / "metrics.jsonl"))

        def write(step: int, values: dict[str, float]) -> None:
            writer.write_scalars(step, values)
            texts = watch({"step": step, **values})
            messages.extend(f"step {step}: warning: {text}" for text in texts.values())
            if texts:
                named = {health_ranges.PREFIX + name: text for name, text in texts.items()}
                writer.write_texts(step, named)

        def totals_now() -> dict[str, float]:
            return totals | {name: totals[name] + getattr(loop, name) for name in StepRunner.CLOCKS}

        def save(state: TrainState, step: int) -> None:
            if processes.broadcast(checkpointer.latest_step()) != step:
                meta = {
                    "config": record,
                    "samplers": [sampler.state() for sampler in loop.samplers],
                    "window": window.state(),
                    "totals": totals_now(),
                }
                checkpointer.save(step, state, meta)

        def stop_if_asked(state: TrainState, step: int) -> None:
            everywhere = processes.all_gather(guard.received)
            received = next((number for number in everywhere if number is not None), None)
            if received is None:
                return
            save(state, step)
            checkpointer.wait()
            name = signal.Signals(received).name
            raise Interrupted(
                f"{name}: saved at step {step}; the same command resumes", signal.Signals(received)
            )

        first = step
        every = [config.log_every, config.eval_every, config.checkpoint.every]
        every += [monitor.every] if monitor.every else []
        try:
            if step < config.steps:
                messages += [summary.cost_line(solver)]
                messages += [f"{solver.name}: {_sizes(task, loop)}; compiling"]
            while step < config.steps:
                while messages:
                    progress.say(messages.pop(0))
                due = int(solver.next_refresh(state))
                if due <= step:
                    state, units = loop.refresh(state)
                    totals["oracle_units"] += units
                    stop_if_asked(state, step)
                    continue
                if not loop.compiled:
                    loop.compile(state, step)
                    messages.append(f"compiled in {loop.compile_seconds:.1f} s")
                    stop_if_asked(state, step)
                    continue
                stop = min(config.steps, due, *(step + n - step % n for n in every))
                state, info = loop.run(state, step, stop)
                step += len(info.inner_loss) - (not all(side[-1] for side in info.finite))
                raise_if_diverged(info, step, checkpointer.latest_step())
                totals["oracle_units"] += float(np.sum(info.oracle_units, dtype=np.float64))
                window.add(info)
                shown = {}
                if step % config.log_every == 0 or step == config.steps:
                    shown = window.means() | {"oracle_units": totals["oracle_units"]}
                    window = MetricAccumulator()
                if step % config.eval_every == 0 or step == config.steps:
                    whole = distributed.gather_to_host(state)
                    shown |= processes.run_on_each(
                        lambda whole=whole: writers.as_scalars(task.evaluate(whole))
                    )
                    if task.best_metric is not None and leads:
                        network = (whole.inner_params, whole.model_state)
                        best.maybe_save(step, shown[task.best_metric], network)
                if monitor.due(step):
                    shown |= monitor(state, step)
                if shown:
                    write(step, shown)
                pace = (step - first) / loop.seconds if loop.seconds else None
                progress.update(step, {k: v for k, v in shown.items() if not _is_hidden(k)}, pace)
                if step % config.checkpoint.every == 0 or step == config.steps:
                    save(state, step)
                stop_if_asked(state, step)
            checkpointer.wait()
        finally:
            writer.close()
            while messages:
                progress.say(messages.pop(0))
            progress.close()
            loop.close()
    return Trained(state, totals_now(), loop, monitor)


def _is_hidden(name: str) -> bool:
    """Whether a value is for the files only; a line on a terminal holds few."""
    return name.startswith(("norm_", "health/", "_")) or name == "oracle_units"


def _sizes(task: Task, loop: StepRunner) -> str:
    sides = (f"{side.num_samples}" for side in (task.inner, task.outer))
    where = "on the device" if loop.on_device else "streamed"
    return f"{' + '.join(sides)} examples, batches of {task.inner.batch_size}, data {where}"


__getattr__ = deprecated.names(__name__)
