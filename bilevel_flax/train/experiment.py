"""A run from its config to its report; the loop in the middle of it is `train_loop.py`."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel_flax import deprecated
from bilevel_flax.train import config as configs
from bilevel_flax.train import metrics as writers
from bilevel_flax.train import multihost, summary
from bilevel_flax.train import workdir as workdirs
from bilevel_flax.train.errors import ConfigError, Diverged, Interrupted
from bilevel_flax.train.heartbeat import Heartbeat
from bilevel_flax.train.metrics.units import format_value, unit_of
from bilevel_flax.train.report import page as report
from bilevel_flax.train.report import trusted
from bilevel_flax.train.run_config import PER_PROCESS, RunConfig
from bilevel_flax.train.setup import make_layout, make_solver, make_task
from bilevel_flax.train.task import Task
from bilevel_flax.train.train_loop import train_loop
from bilevel_flax.train.whole_state import gather_to_host

__all__ = ["Diverged", "Interrupted", "make_report", "train_and_evaluate"]

_WEEK = 7 * 24 * 3600.0
_log = functools.partial(print, flush=True)  # in order with the progress lines, in a pipe too


def _no_log(line: str) -> None:
    del line


def train_and_evaluate(
    config: configs.Config,
    workdir: str | Path,
    metric_writers: Sequence[writers.MetricWriter] = (),
) -> dict[str, Any]:
    """Runs a config to its end, or resumes it; a finished run returns at once.

    Args:
        config: `task` and `solver` (see `config.resolve`), `steps`, the task's own keys, and
            whatever else of `RunConfig` is to differ from its default.
        workdir: gets `config.json`, `metrics.jsonl`, `summary.json`, TensorBoard events,
            `checkpoints/`, `network.npz` and `report.html`.
        metric_writers: further ones, with the methods of clu's `MetricWriter`.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ConfigError: the config cannot be resolved, or the workdir is another config's or in use.
        Diverged: something was not finite.
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        CheckpointError: checkpoints cannot be written, or none of those there can be read.

    Example:
        >>> import tempfile
        >>> from bilevel_flax.train import config as configs
        >>> short = ("steps=40", "optimum=false", "health.every=0", "health.summary=false")
        >>> config = configs.load("configs/hyperparameter_selection.py", short)
        >>> summary = train_and_evaluate(config, tempfile.mkdtemp())
        hypergradient_cosine: not measured...
        >>> summary["solver"], summary["steps"]
        ('saba', 40)
    """
    workdir = Path(workdir)
    run = RunConfig.read(copy.deepcopy(config))  # the caller's stays as it is
    multihost.start(run.distributed)
    processes = multihost.Channel("run")
    log = _log if processes.is_leader else _no_log
    multihost.check_same(processes, _common(run, workdir))
    with contextlib.ExitStack() as stack:
        processes.run_on_leader(lambda: _enter(stack, workdir, run))
        if processes.broadcast((workdir / "summary.json").exists()):
            log(f"{workdir} is a finished run; delete it or choose another --workdir to run again")
            if processes.is_leader and not (workdir / "report.html").exists():
                make_report(workdir, run.report)
            return workdirs.read_json(workdir / "summary.json")

        task = processes.run_on_each(lambda: make_task(run))
        multihost.check_same(processes, _sizes(task))
        run = run.with_steps(task.inner.num_batches)
        layout, task, line = processes.run_on_each(lambda: make_layout(run, task))
        if line:
            log(line)
        solver = processes.run_on_each(lambda: make_solver(run.solver, task))
        trained = train_loop(run, workdir, task, solver, layout, metric_writers)
        trained = trained._replace(state=gather_to_host(trained.state))

        def conclude() -> dict[str, Any]:
            with Heartbeat(log, "final metrics") as beat, configs.naming_missing_keys(run.source):
                results = {
                    "solver": solver.name,
                    **summary.summarize(run, task, trained, workdir, beat),
                }
            workdirs.write_json(workdir / "summary.json", results)
            make_report(workdir, run.report)
            return results

        # This may take as long as the training did; the others wait.
        results = multihost.Channel("conclusion", seconds=_WEEK).run_on_leader(conclude)
    if trained.unsaved is not None:
        log(f"warning: {trained.unsaved} Summary, report and network.npz are written.")
    numbers = configs.flatten(results)
    for name in task.headline:
        there = name in numbers  # else it is no reason to stop: all is written
        value = format_value(numbers[name], unit_of(name, task.units)) if there else "not measured"
        log(f"{name:28s} {value}")
    if "conclusion" in results:
        log(results["conclusion"])
    log(f"report: {workdir / 'report.html'}")
    return results


def _enter(stack: contextlib.ExitStack, workdir: Path, run: RunConfig) -> None:
    stack.enter_context(workdirs.lock(workdir))
    workdirs.check_same_run(workdir, run.record)


def _common(run: RunConfig, workdir: Path) -> dict[str, Any]:
    """What all processes must have in common, by dotted key."""
    own = tuple(f"{name}*" for name in PER_PROCESS)
    return {
        name: value
        for name, value in configs.flatten({**run.record, "workdir": str(workdir)}).items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in own)
    }


def _sizes(task: Task) -> dict[str, Any]:
    """The sizes of the data, which all processes must have in common."""
    sizes: dict[str, Any] = {}
    for name, side in (("inner", task.inner), ("outer", task.outer)):
        sizes[f"{name} examples"] = side.num_samples
        sizes[f"{name} batch size"] = side.batch_size
        for path, leaf in jax.tree.leaves_with_path(side.batches):
            key = f"{name} data {jax.tree_util.keystr(path)}"
            sizes[key] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return sizes


def make_report(
    workdir: Path,
    sections: str | None = None,
    *,
    trust: bool = False,
    log: Callable[[str], None] = _log,
) -> Path:
    """Writes `report.html` from the files of a workdir.

    Args:
        workdir: of a run.
        sections: `module:function` that gives the task's sections, out of the caller's own config;
            None: what the folder's config names, as far as it is trusted (SECURITY.md).
        trust: also run code of the working directory that the folder's config names.
        log: prints a line, where the task's sections are left out.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json): give the --workdir of one"
        )
    parts: Sequence[report.Section] = ()
    config = workdirs.read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is damaged (no JSON object): bring it back or delete it")
    named = config.get("report")
    if sections is not None:
        parts = configs.imported(sections)(workdir)
    elif named is not None:
        try:
            parts = trusted.find_sections(named, workdir, trust=trust)(workdir)
        except trusted.UntrustedError as error:
            log(f"the report's own sections are left out: {error}")
        except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
            # The folder may be anybody's, and cut off anywhere.
            why = error or type(error).__name__
            log(f"the report's own sections are left out, for {workdir} is damaged: {why}")
    return report.write_report(workdir, sections=parts)


__getattr__ = deprecated.names(__name__)
