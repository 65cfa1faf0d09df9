"""The host loop: it reads from top to bottom and knows no solver's name.

config -> task -> solver -> state -> metrics, checkpoints, report.
"""

from __future__ import annotations

import copy
import functools
import platform
import signal
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel_flax import checkpoint, diagnostics, report, workdirs, writers
from bilevel_flax import config as configs
from bilevel_flax.base import BilevelSolver, Info, TrainState
from bilevel_flax.best import Best
from bilevel_flax.loop import Loop
from bilevel_flax.progress import Progress
from bilevel_flax.signals import SignalGuard
from bilevel_flax.task import Task
from bilevel_flax.window import Window

# Settings that change nothing about the numbers of a run.
HARMLESS = (
    "log_every",
    "checkpoint.*",
    "report",
    "on_device",
    "data.manual_dir",
    "data.data_dir",
)
_POSITIVE = ("log_every", "eval_every", "checkpoint.every", "checkpoint.keep")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "bilevel-flax")

_say = functools.partial(print, flush=True)  # in order with the progress lines, in a pipe too


class Diverged(FloatingPointError):
    """A direction was not finite; the message says which, at which step, and what to try."""


class Interrupted(RuntimeError):
    """SIGTERM or Ctrl-C; everything is saved.

    Attributes:
        signal: which one.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.signal = received


def train_and_evaluate(config: configs.Config, workdir: str | Path) -> dict[str, Any]:
    """Runs a config to its end, or resumes it; a finished run returns at once.

    Args:
        config: keys `task` and `solver` (see `config.resolve`), `steps` (None: as many as give
            `epochs` passes over the inner data), `seed`, `log_every`, `eval_every` and
            `checkpoint.every` (steps), `checkpoint.keep`, `on_device` (True, False, or None to
            decide by size), `report` (`module:function` that gives the report's sections).
        workdir: gets `config.json`, `metrics.jsonl`, `summary.json`, TensorBoard
            events, `checkpoints/` and `report.html`.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ConfigError: the config cannot be resolved, or the workdir is another config's or in use.
        Diverged: a direction was not finite.
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        CheckpointError: checkpoints cannot be written, or none of those there can be read.
    """
    workdir = Path(workdir)
    config = copy.deepcopy(config)  # the caller's stays as it is
    _check_counts(config)
    record = configs.plain(config)
    with workdirs.opened(workdir):
        workdirs.claim(workdir, record, HARMLESS)
        if (workdir / "summary.json").exists():
            _say(f"{workdir} is a finished run; delete it or choose another --workdir to run again")
            if not (workdir / "report.html").exists():
                make_report(workdir)
            return workdirs.read_json(workdir / "summary.json")

        task: Task = configs.resolve(config.task, config=config)
        if config.steps is None:
            config.steps = max(1, round(config.epochs * task.inner.num_batches))
        solver = make_solver(config.solver, task)
        state, totals = train(config, workdir, task, solver, record)
        chosen, at = state, config.steps
        if task.select is not None:
            network = (state.inner_params, state.model_state)
            at, (params, model_state) = Best(workdir / "best.npz").restore(network)
            chosen = state.replace(inner_params=params, model_state=model_state)
        summary = {
            "solver": solver.name,
            "seed": config.seed,
            "steps": config.steps,
            **totals,
            "seconds_per_step": totals["seconds"] / config.steps,
            "adjoint_residual": diagnostics.adjoint_residual(
                task.problem, state.variables, task.inner, task.outer, state.model_state, state.rng
            ),
            "selected_step": at,
            **task.finish(chosen, workdir, _say),
            "versions": versions(),
        }
        workdirs.write_json(workdir / "summary.json", summary)
        make_report(workdir)
    for name in task.headline:
        _say(f"{name:28s} {summary[name]:.4f}")
    _say(f"report: {workdir / 'report.html'}")
    return summary


def train(
    config: configs.Config,
    workdir: Path,
    task: Task,
    solver: BilevelSolver,
    record: Mapping[str, Any] | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """The loop itself: all steps from the newest checkpoint, or from the start.

    Args:
        config: as for `train_and_evaluate`.
        workdir: gets the files.
        task: what to solve.
        solver: how.
        record: the config as the user gave it, for `config.json` and the checkpoints; None: as
            `config` is now.

    Returns:
        The last state, and the totals of all sessions: `oracle_units`, `seconds`, `cpu_seconds`
        (of updates and refreshes) and `compile_seconds`.

    Raises:
        Diverged, Interrupted, CheckpointError: as `train_and_evaluate`.
    """
    record = configs.plain(config) if record is None else record
    init_rng, run_rng = jax.random.split(jax.random.PRNGKey(config.seed))
    start = task.init(init_rng)
    state = solver.init(
        start.inner_params, start.outer_params, model_state=start.model_state, rng=run_rng
    )
    loop = Loop(solver, task.inner, task.outer, seed=config.seed, on_device=config.on_device)
    step, window, totals = 0, Window(), dict.fromkeys(("oracle_units", *Loop.CLOCKS), 0.0)
    residual = diagnostics.residual_estimator(task.problem, task.inner, task.outer)
    progress = Progress(config.steps)
    messages: list[str] = []
    with (
        checkpoint.Checkpointer(
            workdir / "checkpoints", keep=config.checkpoint.keep, on_event=messages.append
        ) as checkpointer,
        SignalGuard() as guard,
    ):
        restored = checkpointer.restore(state)
        if restored is not None:
            state, step = restored.state, restored.step
            for sampler, saved in zip(loop.samplers, restored.meta["samplers"], strict=True):
                sampler.check(saved)
            window, totals = Window(**restored.meta["window"]), restored.meta["totals"]
            messages.append(f"resuming {workdir} at step {step}")
        if step == 0:  # of a run that ended before its first checkpoint, perhaps another config's
            (workdir / "best.npz").unlink(missing_ok=True)
        best = Best(workdir / "best.npz")
        workdirs.write_json(workdir / "config.json", record)
        log = writers.JsonlWriter(workdir / "metrics.jsonl")
        log.truncate_after(step)
        board = writers.TensorBoardWriter(workdir / "tensorboard", purge_step=step + 1)
        writer = writers.MultiWriter([log, board])

        def totals_now() -> dict[str, float]:
            return totals | {name: totals[name] + getattr(loop, name) for name in Loop.CLOCKS}

        def save(state: TrainState, step: int) -> None:
            if checkpointer.latest_step() != step:
                meta = {
                    "config": record,
                    "samplers": [sampler.state() for sampler in loop.samplers],
                    "window": window.state(),
                    "totals": totals_now(),
                }
                checkpointer.save(step, state, meta)

        def stop_if_asked(state: TrainState, step: int) -> None:
            if guard.received is None:
                return
            save(state, step)
            checkpointer.wait()
            name = signal.Signals(guard.received).name
            raise Interrupted(
                f"{name}: saved at step {step}; the same command resumes", guard.received
            )

        every = (config.log_every, config.eval_every, config.checkpoint.every)
        try:
            if step < config.steps:
                messages.append(f"{solver.name}: {_sizes(task, loop)}; compiling")
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
                _raise_if_diverged(info, step, checkpointer.latest_step())
                totals["oracle_units"] += float(np.sum(info.oracle_units, dtype=np.float64))
                window.add(info)
                shown = {}
                if step % config.log_every == 0 or step == config.steps:
                    shown = window.means() | {"oracle_units": totals["oracle_units"]}
                    window = Window()
                if step % config.eval_every == 0 or step == config.steps:
                    shown |= {"adjoint_residual": float(residual(state))}
                    shown |= {k: float(v) for k, v in task.evaluate(state).items()}
                    if task.select is not None:
                        network = (state.inner_params, state.model_state)
                        best.offer(step, shown[task.select], network)
                if shown:
                    writer.write_scalars(step, shown)
                progress.update(step, {k: v for k, v in shown.items() if not _is_hidden(k)})
                if step % config.checkpoint.every == 0 or step == config.steps:
                    save(state, step)
                stop_if_asked(state, step)
            checkpointer.wait()
        finally:
            while messages:
                progress.say(messages.pop(0))
            progress.close()
            loop.close()
            writer.close()
    return state, totals_now()


def _is_hidden(name: str) -> bool:
    """Whether a value is for the files only; a line on a terminal holds few."""
    return name.startswith("norm_") or name == "oracle_units"


def _sizes(task: Task, loop: Loop) -> str:
    sides = (f"{side.num_samples}" for side in (task.inner, task.outer))
    where = "on the device" if loop.on_device else "streamed"
    return f"{' + '.join(sides)} examples, batches of {task.inner.batch_size}, data {where}"


def _check_counts(config: configs.Config) -> None:
    for name in _POSITIVE:
        value = functools.reduce(lambda node, key: node[key], name.split("."), config)
        if not isinstance(value, int) or value < 1:
            raise configs.ConfigError(f"--config.{name}={value}: must be an integer of 1 or more")
    name = "epochs" if config.steps is None else "steps"
    if config[name] <= 0:
        raise configs.ConfigError(f"--config.{name}={config[name]}: must be above 0")


def _raise_if_diverged(info: Info, step: int, kept: int | None) -> None:
    finite = [bool(side[-1]) for side in info.finite]
    if all(finite):
        return
    sides = ("inner (D_z)", "adjoint (D_v)", "outer (D_x)")
    lost = [side for side, good in zip(sides, finite, strict=True) if not good]
    first = (
        "a lower inner step or gradient clipping, and check that the data hold no NaN and that "
        'batch["index"] lies within the per-sample parameters'
        if not finite[0]
        else "a lower adjoint step (below 2 over the inner loss's largest curvature) or clipping it"
        if not finite[1]
        else "a lower outer step, or clipping it"
    )
    where = (
        f"the checkpoint of step {kept} is kept" if kept is not None else "nothing was saved yet"
    )
    raise Diverged(
        f"step {step}: not finite: the direction of {', '.join(lost)} "
        f"(norms inner {info.norms.inner[-1]:.3g}, adjoint {info.norms.adjoint[-1]:.3g}, "
        f"outer {info.norms.outer[-1]:.3g}); {where}; try {first}"
    )


def make_solver(config: Any, task: Task) -> BilevelSolver:
    """The solver that `config.solver` describes, handed what it takes of problem and data."""
    return configs.resolve(
        config,
        problem=task.problem,
        num_inner_batches=task.inner.num_batches,
        num_outer_batches=task.outer.num_batches,
        inner_weights=task.inner.weights if task.inner.ragged else None,
        outer_weights=task.outer.weights if task.outer.ragged else None,
    )


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version(), "platform": jax.default_backend()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_report(workdir: Path) -> Path:
    """Writes `report.html` from the files of a workdir.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json): give the --workdir of one"
        )
    name = workdirs.read_json(path).get("report")
    sections = configs.imported(name)(workdir) if name else ()
    return report.write_report(workdir, sections=sections)
