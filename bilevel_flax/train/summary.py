"""What a finished run says about its cost and its hypergradient, and what it was made with."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from bilevel_flax.base import BilevelSolver, Problem, TrainState
from bilevel_flax.train import config as configs
from bilevel_flax.train import multihost as distributed
from bilevel_flax.train import step_time
from bilevel_flax.train.health.monitor import Monitor
from bilevel_flax.train.step_runner import StepRunner

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "bilevel-flax")


def costs(
    config: configs.Config,
    problem: Problem,
    state: TrainState,
    loop: StepRunner,
    monitor: Monitor,
    totals: Mapping[str, float],
    log: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> dict[str, float]:
    """What a step cost, and how good its direction of x was at the end.

    Args:
        config: the run's; `config.health.summary=False` leaves out what takes time.
        problem: the run's losses.
        state: the last one.
        loop: the run's.
        monitor: the run's.
        totals: the run's, with `oracle_units`.
        log: lines of `metrics.jsonl`; a check that is there already is not made again.
        say: prints a line.

    Returns:
        `gradient_units_per_step`, full passes included; `step_seconds_over_plain`, seconds of the
        compiled step over those of a plain Optax step; `hypergradient_cosine`, between D_x and the
        reference of `diagnostics.hypergradient_check` on held minibatches, with
        `hypergradient_reference_residual`, how far the reference's own system is from solved.
        NaN where there is no value: a line says why.
    """
    found = {
        "gradient_units_per_step": totals["oracle_units"] / config.steps,
        "step_seconds_over_plain": math.nan,
        "hypergradient_cosine": math.nan,
        "hypergradient_reference_residual": math.nan,
    }
    if not (config.get("health") or {}).get("summary", True):
        say("step_seconds_over_plain, hypergradient_cosine: not measured (config.health.summary)")
        return found
    if distributed.process_count() > 1:
        say("step_seconds_over_plain: not measured with several processes")
    elif "inner" in config.solver:
        inner = configs.resolve(config.solver.inner)
        bilevel, plain = step_time.over_plain(loop, problem, inner, state)
        found["step_seconds_over_plain"] = bilevel / plain
    else:
        say("step_seconds_over_plain: none, config.solver has no `inner` to train plainly with")
    last = [row for row in log if row["step"] == config.steps and "hypergradient_cosine" in row]
    made = last[-1] if last else monitor.last_check(state)
    found["hypergradient_cosine"] = float(made["hypergradient_cosine"])
    found["hypergradient_reference_residual"] = float(made["health/reference_residual"])
    if not math.isfinite(found["hypergradient_cosine"]):
        say("hypergradient_cosine: none, D_x is 0 or not finite: the solver keeps no adjoint?")
    return found


def cost_line(solver: BilevelSolver) -> str:
    """The cost of a step as configured, for the log."""
    line = f"cost: {solver.units:g} gradient units a step (plain training: 1)"
    inner, outer = solver.refresh_units
    if inner or outer:
        line += f"; each full pass {inner:g} an inner and {outer:g} an outer minibatch"
    return line


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version(), "platform": jax.default_backend()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
