"""A run from its config to its report; the loop in the middle of it is `host_loop.py`."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from bilevel_flax import config as configs
from bilevel_flax import diagnostics, report, summary, workdirs, writers
from bilevel_flax.best import Best
from bilevel_flax.failures import Diverged, Interrupted
from bilevel_flax.host_loop import Trained, train
from bilevel_flax.run_config import check_counts, make_solver, make_task
from bilevel_flax.run_mesh import make_layout

# Settings that change nothing about the numbers of a run.
HARMLESS = (
    "log_every",
    "checkpoint.*",
    "report",
    "health.*",
    "on_device",
    "mesh",
    "rules",
    "collectives",
    "data.manual_dir",
    "data.data_dir",
)

__all__ = [
    "HARMLESS",
    "Diverged",
    "Interrupted",
    "Trained",
    "make_report",
    "make_solver",
    "train",
    "train_and_evaluate",
]

_say = functools.partial(print, flush=True)  # in order with the progress lines, in a pipe too


def train_and_evaluate(config: configs.Config, workdir: str | Path) -> dict[str, Any]:
    """Runs a config to its end, or resumes it; a finished run returns at once.

    Args:
        config: keys `task` and `solver` (see `config.resolve`), `problem` (optional: `remat`,
            `microbatches`, `compute_dtype`, see `Problem`), `steps` (None: as many as give
            `epochs` passes over the inner data), `seed`, `log_every`, `eval_every` and
            `checkpoint.every` (steps), `checkpoint.keep`, `on_device` (True, False, or None to
            decide by size), `mesh`, `rules` and `collectives` (many devices, see
            docs/sharding.md), `report` (`module:function` that gives the report's sections),
            `health` (optional: `share` of the run's cost for its measurements, `every`, `summary`;
            see docs/health.md).
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
    check_counts(config)
    record = configs.plain(config)
    with workdirs.opened(workdir):
        workdirs.claim(workdir, record, HARMLESS)
        if (workdir / "summary.json").exists():
            _say(f"{workdir} is a finished run; delete it or choose another --workdir to run again")
            if not (workdir / "report.html").exists():
                make_report(workdir)
            return workdirs.read_json(workdir / "summary.json")

        task = make_task(config)
        if config.steps is None:
            config.steps = max(1, round(config.epochs * task.inner.num_batches))
        layout, task, said = make_layout(config, task)
        if said:
            _say(said)
        solver = make_solver(config.solver, task)
        state, totals, loop, monitor = train(config, workdir, task, solver, record, layout)
        chosen, at = state, config.steps
        if task.select is not None:
            network = (state.inner_params, state.model_state)
            at, (params, model_state) = Best(workdir / "best.npz").restore(network)
            chosen = state.replace(inner_params=params, model_state=model_state)
        results = {
            "solver": solver.name,
            "seed": config.seed,
            "steps": config.steps,
            **totals,
            "seconds_per_step": totals["seconds"] / config.steps,
            "adjoint_residual": diagnostics.adjoint_residual(
                task.problem, state.variables, task.inner, task.outer, state.model_state, state.rng
            ),
            **summary.costs(
                config,
                task.problem,
                state,
                loop,
                monitor,
                totals,
                writers.read_metrics(workdir / "metrics.jsonl"),
                _say,
            ),
            "selected_step": at,
            **task.finish(chosen, workdir, _say),
            "versions": summary.versions(),
        }
        loop.close()
        workdirs.write_json(workdir / "summary.json", results)
        make_report(workdir)
    for name in task.headline:
        _say(f"{name:28s} {results[name]:.4f}")
    _say(f"report: {workdir / 'report.html'}")
    return results


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
