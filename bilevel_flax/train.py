"""The host loop: it reads from top to bottom and knows no solver's name.

config -> task -> solver -> state -> metrics, checkpoints, report.
"""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from bilevel_flax import checkpoint, config_diff, diagnostics, report, writers
from bilevel_flax import config as configs
from bilevel_flax.base import BilevelSolver, Info, TrainState
from bilevel_flax.loop import Loop
from bilevel_flax.progress import Progress
from bilevel_flax.signals import SignalGuard
from bilevel_flax.task import Task

# Settings that change nothing about the numbers of a run.
HARMLESS = ("log_every", "checkpoint.*", "report", "data.manual_dir", "data.data_dir")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "bilevel-flax")


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


class _Window:
    """Means of per-step values since the last log line; survives a checkpoint exactly."""

    def __init__(self, saved: Mapping[str, str] | None = None, count: int = 0):
        self._sums = {k: float.fromhex(v) for k, v in (saved or {}).items()}
        self._count = count

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        for name, steps in values.items():
            # Summed one by one: the result must not depend on where chunks end.
            total = self._sums.get(name, 0.0)
            for value in steps.tolist():
                total += value
            self._sums[name] = total
        self._count += len(next(iter(values.values())))

    def means(self) -> dict[str, float]:
        return {name: total / self._count for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        return {"saved": {k: v.hex() for k, v in self._sums.items()}, "count": self._count}


def _per_step(info: Info) -> dict[str, np.ndarray]:
    """Info's scalars by the names they have in the log, [steps] each."""
    named = {
        "inner_loss": info.inner_loss,
        "outer_loss": info.outer_loss,
        "adjoint_residual": info.adjoint_residual,
        "norm_inner": info.norms.inner,
        "norm_adjoint": info.norms.adjoint,
        "norm_outer": info.norms.outer,
        **info.metrics,
    }
    return {name: np.asarray(value, np.float64) for name, value in named.items()}


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
        f"step {step}: the direction of {', '.join(lost)} is not finite "
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


def _claim(workdir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Makes the workdir this config's own; returns the summary of a finished run."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir}: not writable; choose another folder")
    path = workdir / "config.json"
    if path.exists():
        different = config_diff.config_differences(json.loads(path.read_text()), config, HARMLESS)
        if different:
            raise configs.ConfigError(
                f"--workdir={workdir} holds a run with another config ({'; '.join(different)}): "
                "use that config to resume it, or another workdir"
            )
    else:
        write_json(path, config)
    summary = workdir / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step: a killed process leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=True) + "\n")
    os.replace(partial, path)


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version(), "platform": jax.default_backend()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Runs a config to its end, or resumes it; a finished run returns at once.

    Args:
        config: keys `task` and `solver` (see `config.resolve`), `steps`, `seed`, `log_every`,
            `eval_every` and `checkpoint.every` (steps), `checkpoint.keep`, `on_device` (True,
            False, or None to decide by size), `report` (`module:function` that gives the report's
            sections).
        workdir: gets `config.json`, `metrics.jsonl`, `summary.json`, TensorBoard events,
            `checkpoints/` and `report.html`.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ConfigError: the config cannot be resolved, or the workdir is another config's.
        Diverged: a direction was not finite.
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        CheckpointError: checkpoints cannot be written, or none of those there can be read.
    """
    workdir = Path(workdir)
    finished = _claim(workdir, configs.plain(config))
    if finished is not None:
        print(f"{workdir} is a finished run; delete it or choose another --workdir to run again")
        if not (workdir / "report.html").exists():
            make_report(workdir)
        return finished

    task: Task = configs.resolve(config.task, config=config)
    solver = make_solver(config.solver, task)
    init_rng, run_rng = jax.random.split(jax.random.PRNGKey(config.seed))
    start = task.init(init_rng)
    state = solver.init(
        start.inner_params, start.outer_params, model_state=start.model_state, rng=run_rng
    )
    loop = Loop(solver, task.inner, task.outer, seed=config.seed, on_device=config.on_device)
    messages: list[str] = []
    with (
        checkpoint.Checkpointer(
            workdir / "checkpoints", keep=config.checkpoint.keep, on_event=messages.append
        ) as checkpointer,
        SignalGuard() as guard,
    ):
        restored = checkpointer.restore(state)
        step, window, totals = 0, _Window(), {"oracle_units": 0.0, "seconds": 0.0}
        totals |= {"cpu_seconds": 0.0, "compile_seconds": 0.0}
        if restored is not None:
            state, step = restored.state, restored.step
            for sampler, saved in zip(loop.samplers, restored.meta["samplers"], strict=True):
                sampler.check(saved)
            window = _Window(**restored.meta["window"])
            totals = restored.meta["totals"]
        log = writers.JsonlWriter(workdir / "metrics.jsonl")
        log.truncate_after(step)
        board = writers.TensorBoardWriter(workdir / "tensorboard", purge_step=step + 1)
        writer = writers.MultiWriter([log, board])
        progress = Progress(config.steps, step)
        for line in messages:
            progress.say(line)
        if restored is not None:
            progress.say(f"resuming {workdir} at step {step}")

        def totals_now() -> dict[str, float]:
            return totals | {
                name: totals[name] + getattr(loop, name)
                for name in ("seconds", "cpu_seconds", "compile_seconds")
            }

        def save(state: TrainState, step: int) -> None:
            if checkpointer.latest_step() != step:
                meta = {
                    "config": configs.plain(config),
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
            while step < config.steps:
                due = int(solver.next_refresh(state))
                if due <= step:
                    state, units = loop.refresh(state)
                    totals["oracle_units"] += units
                    stop_if_asked(state, step)
                    continue
                stop = min(config.steps, due, *(step + n - step % n for n in every))
                state, info = loop.run(state, step, stop)
                step += len(info.inner_loss) - (not all(side[-1] for side in info.finite))
                _raise_if_diverged(info, step, checkpointer.latest_step())
                totals["oracle_units"] += float(np.sum(info.oracle_units, dtype=np.float64))
                window.add(_per_step(info))
                shown = {}
                if step % config.log_every == 0 or step == config.steps:
                    shown = window.means() | {"oracle_units": totals["oracle_units"]}
                    window = _Window()
                if step % config.eval_every == 0 or step == config.steps:
                    shown |= {k: float(v) for k, v in task.evaluate(state).items()}
                if shown:
                    writer.write_scalars(step, shown)
                progress.update(step, {k: v for k, v in shown.items() if not k.startswith("norm")})
                if step % config.checkpoint.every == 0 or step == config.steps:
                    save(state, step)
                stop_if_asked(state, step)
                while messages:
                    progress.say(messages.pop(0))
            checkpointer.wait()
        finally:
            progress.close()
            loop.close()
            writer.close()

        totals = totals_now()
        results = task.finish(state, workdir, print)
        summary = {
            "solver": solver.name,
            "seed": config.seed,
            "steps": step,
            **totals,
            "seconds_per_step": totals["seconds"] / max(step, 1),
            "adjoint_residual": diagnostics.adjoint_residual(
                task.problem, state.variables, task.inner, task.outer, state.model_state, state.rng
            ),
            **results,
            "versions": versions(),
        }
        write_json(workdir / "summary.json", summary)
    make_report(workdir)
    for name in task.headline:
        print(f"{name:28s} {summary[name]:.4f}")
    print(f"report: {workdir / 'report.html'}")
    return summary


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
    name = json.loads(path.read_text()).get("report")
    sections = configs.imported(name)(workdir) if name else ()
    return report.write_report(workdir, sections=sections)
