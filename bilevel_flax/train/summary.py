"""What a finished run says about its cost and its hypergradient, and what it was made with."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from bilevel_flax import data, diagnostics
from bilevel_flax.base import TrainState
from bilevel_flax.checkpoints import arrays_file
from bilevel_flax.checkpoints.best import BestCheckpoint
from bilevel_flax.train.metrics import read_metrics
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.task import Task
from bilevel_flax.train.train_loop import Trained

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_OF_A_STREAM = 32  # minibatches that stand for all of them at the end


def summarize(
    run: RunConfig, task: Task, trained: Trained, workdir: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """The contents of `summary.json`; writes `network.npz`, the network that one would hand over.

    Args:
        run: the run's config, with its number of steps.
        task: the run's.
        trained: what the loop returned, the state whole on this process.
        workdir: the run's.
        log: prints a line.

    Returns:
        Steps, costs, `adjoint_residual` on all data, `hypergradient_cosine`, `selected_step`, the
        task's own `final_metrics`, versions.
    """
    state, totals = trained.state, trained.totals
    chosen, step = _selected(task, state, run.steps, workdir)
    parts = {
        name: getattr(chosen, name) for name in ("inner_params", "outer_params", "model_state")
    }
    arrays_file.write(workdir / "network.npz", parts, {"step": step})
    return {
        "seed": run.seed,
        "steps": run.steps,
        **totals,
        "seconds_per_step": totals["seconds"] / run.steps,
        "steps_per_second": run.steps / max(totals["seconds"], 1e-9),
        "gradient_units_per_step": totals["oracle_units"] / run.steps,
        "adjoint_residual": _adjoint_residual(run, task, trained),
        **_hypergradient(run, trained, workdir, log),
        "selected_step": step,
        **task.conclusion(chosen, workdir, log),
        "headline": list(task.headline),
        "versions": versions(),
    }


def _selected(
    task: Task, state: TrainState, last_step: int, workdir: Path
) -> tuple[TrainState, int]:
    """The state with the network from where the task's best metric was lowest, and that step."""
    if task.best_metric is None:
        return state, last_step
    network = (state.inner_params, state.model_state)
    step, (params, model_state) = BestCheckpoint(workdir / "best.npz").restore(network)
    return state.replace(inner_params=params, model_state=model_state), step


def _readable(side: data.FiniteSum) -> data.FiniteSum:
    """All of a side, or a few minibatches of a streamed one: to read it may take for ever."""
    return data.subsample(side, _OF_A_STREAM) if side.streamed else side


def _adjoint_residual(run: RunConfig, task: Task, trained: Trained) -> float:
    """On all data; NaN where z and v are not those of all data (`health.summary=False`)."""
    if trained.obstacle or not run.health.summary:
        return math.nan
    state, sides = trained.state, (_readable(task.inner), _readable(task.outer))
    return diagnostics.adjoint_residual(
        task.problem, state.variables, *sides, state.model_state, state.rng
    )


def _hypergradient(
    run: RunConfig, trained: Trained, workdir: Path, log: Callable[[str], None]
) -> dict[str, float]:
    """`hypergradient_cosine` and how far its own reference is from solved; NaN: not measured."""
    names = {
        "hypergradient_cosine": "hypergradient_cosine",
        "hypergradient_reference_residual": "health/reference_residual",
    }
    if not run.health.summary:
        log("hypergradient_cosine: not measured (--config.health.summary=False)")
        return dict.fromkeys(names, math.nan)
    if trained.obstacle:
        log(f"hypergradient_cosine: not measured, {trained.obstacle} stops second derivatives")
        return dict.fromkeys(names, math.nan)
    rows = read_metrics(workdir / "metrics.jsonl")
    measured = [r for r in rows if r["step"] == run.steps and "hypergradient_cosine" in r]
    check = measured[-1] if measured else trained.monitor.last_check(trained.state)
    results = {name: float(check.get(key, math.nan)) for name, key in names.items()}
    if not math.isfinite(results["hypergradient_cosine"]):
        log("hypergradient_cosine: none, D_x is 0 or not finite: the solver keeps no adjoint?")
    return results


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    import bilevel_flax

    numbers = {"python": platform.python_version(), "platform": jax.default_backend()}
    for name in _PACKAGES:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers | {
        "bilevel-flax": bilevel_flax.__version__
    }  # of the code that runs, not what pip noted
