"""A run from its config to its report; the loop in the middle of it is `train_loop.py`."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel_flax import data, deprecated, diagnostics
from bilevel_flax.checkpoints.best import BestCheckpoint
from bilevel_flax.train import config as configs
from bilevel_flax.train import config_diff, summary
from bilevel_flax.train import metrics as writers
from bilevel_flax.train import multihost as distributed
from bilevel_flax.train import workdir as workdirs
from bilevel_flax.train.errors import Diverged, Interrupted
from bilevel_flax.train.metrics.units import format_value, unit_of
from bilevel_flax.train.report import page as report
from bilevel_flax.train.report import trusted
from bilevel_flax.train.run_mesh import make_layout
from bilevel_flax.train.setup import check_counts, make_solver, make_task
from bilevel_flax.train.task import Task
from bilevel_flax.train.train_loop import Trained, train_loop

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
    "distributed*",
    "problem.remat",
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
    "train_loop",
    "train_and_evaluate",
]

# What may differ between the processes of one run.
_OWN = ("distributed", "data.manual_dir", "data.data_dir")
_OF_A_STREAM = 32  # minibatches that stand for all of them at the end
_WEEK = 7 * 24 * 3600.0
_say = functools.partial(print, flush=True)  # in order with the progress lines, in a pipe too


def _hush(line: str) -> None:
    del line


def train_and_evaluate(
    config: configs.Config,
    workdir: str | Path,
    metric_writers: Sequence[writers.MetricWriter] = (),
) -> dict[str, Any]:
    """Runs a config to its end, or resumes it; a finished run returns at once.

    Args:
        config: keys `task` and `solver` (see `config.resolve`), `problem` (optional: `remat`,
            `microbatches`, `compute_dtype`, see `Problem`), `steps` (None: as many as give
            `epochs` passes over the inner data), `seed`, `log_every`, `eval_every` and
            `checkpoint.every` (steps), `checkpoint.keep`, `on_device` (True, False, or None to
            decide by size), `mesh`, `rules` and `collectives` (many devices, see
            docs/sharding.md), `report` (`module:function` that gives the report's sections),
            `health` (optional: `every`, `summary`; see docs/health.md), `distributed` (optional: as
            `distributed.start` takes it; see docs/multi_host.md).
        workdir: gets `config.json`, `metrics.jsonl`, `summary.json`, TensorBoard
            events, `checkpoints/` and `report.html`.
        metric_writers: further ones, with the methods of clu's `MetricWriter`.

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
    distributed.start(config.get("distributed"))
    processes, leads = distributed.Channel("run"), distributed.is_leader()
    say = _say if leads else _hush
    distributed.check_same(processes, _essential(record, {"workdir": str(workdir)}))
    with contextlib.ExitStack() as stack:
        processes.run_on_leader(lambda: _open(stack, workdir, record))
        if processes.broadcast((workdir / "summary.json").exists()):
            say(f"{workdir} is a finished run; delete it or choose another --workdir to run again")
            if leads and not (workdir / "report.html").exists():
                make_report(workdir, config.get("report"))
            return workdirs.read_json(workdir / "summary.json")

        task = processes.run_on_each(lambda: make_task(config))
        distributed.check_same(processes, _sizes(task))
        if config.steps is None:
            config.steps = max(1, round(config.epochs * task.inner.num_batches))
        layout, task, said = processes.run_on_each(lambda: make_layout(config, task))
        if said:
            say(said)
        solver = processes.run_on_each(lambda: make_solver(config.solver, task))
        trained = train_loop(config, workdir, task, solver, record, layout, metric_writers)
        whole = trained._replace(state=distributed.gather_to_host(trained.state))
        # What follows may take as long as the training did; the others wait.
        results = distributed.Channel("conclusion", seconds=_WEEK).run_on_leader(
            lambda: _conclude(config, workdir, task, solver.name, whole)
        )
        trained.loop.close()
    numbers = config_diff.flatten(results)
    for name in task.headline:
        say(f"{name:28s} {format_value(numbers[name], unit_of(name, task.units))}")
    if "conclusion" in results:
        say(results["conclusion"])
    say(f"report: {workdir / 'report.html'}")
    return results


def _open(stack: contextlib.ExitStack, workdir: Path, record: dict[str, Any]) -> None:
    stack.enter_context(workdirs.lock(workdir))
    workdirs.check_same_run(workdir, record, HARMLESS)


def _essential(record: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """What all processes must have in common, by dotted key."""
    flat = config_diff.flatten(record) | more
    return {key: value for key, value in flat.items() if not key.startswith(_OWN)}


def _sizes(task: Task) -> dict[str, Any]:
    """The sizes of the data, which all processes must have in common."""
    found = {}
    for name, side in (("inner", task.inner), ("outer", task.outer)):
        found[f"{name} examples"] = side.num_samples
        found[f"{name} batch size"] = side.batch_size
        for path, leaf in jax.tree.leaves_with_path(side.batches):
            key = f"{name} data {jax.tree_util.keystr(path)}"
            found[key] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return found


def _conclude(
    config: configs.Config, workdir: Path, task: Task, solver: str, trained: Trained
) -> dict[str, Any]:
    """The summary of a run, with all that the task adds to it; process 0 writes it."""
    state, totals = trained.state, trained.totals
    chosen, at = state, config.steps
    if task.best_metric is not None:
        network = (state.inner_params, state.model_state)
        at, (params, model_state) = BestCheckpoint(workdir / "best.npz").restore(network)
        chosen = state.replace(inner_params=params, model_state=model_state)
    results = {
        "solver": solver,
        "seed": config.seed,
        "steps": config.steps,
        **totals,
        "seconds_per_step": totals["seconds"] / config.steps,
        "adjoint_residual": diagnostics.adjoint_residual(
            task.problem,
            state.variables,
            _readable(task.inner),
            _readable(task.outer),
            state.model_state,
            state.rng,
        ),
        **summary.costs(
            config,
            task.problem,
            state,
            trained.loop,
            trained.monitor,
            totals,
            writers.read_metrics(workdir / "metrics.jsonl"),
            _say,
        ),
        "selected_step": at,
        **task.final_metrics(chosen, workdir, _say),
        "headline": list(task.headline),
        "versions": summary.versions(),
    }
    workdirs.write_json(workdir / "summary.json", results)
    make_report(workdir, config.get("report"))
    return results


def _readable(side: data.FiniteSum) -> data.FiniteSum:
    """All of a side, or a few minibatches of a streamed one: to read it may take for ever."""
    return data.subsample(side, _OF_A_STREAM) if side.streamed else side


def make_report(
    workdir: Path,
    sections: str | None = None,
    *,
    trust: bool = False,
    say: Callable[[str], None] = _say,
) -> Path:
    """Writes `report.html` from the files of a workdir.

    Args:
        workdir: of a run.
        sections: `module:function` that gives the task's sections, out of the caller's own config;
            None: what the folder's config names, as far as it is trusted (SECURITY.md).
        trust: also run code of the working directory that the folder's config names.
        say: prints a line, where the task's sections are left out.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json): give the --workdir of one"
        )
    parts: Sequence[report.Section] = ()
    named = workdirs.read_json(path).get("report")
    if sections is not None:
        parts = configs.imported(sections)(workdir)
    elif named is not None:
        try:
            parts = trusted.find_sections(named, workdir, trust=trust)(workdir)
        except trusted.UntrustedError as error:
            say(f"the report's own sections are left out: {error}")
    return report.write_report(workdir, sections=parts)


__getattr__ = deprecated.names(__name__)
