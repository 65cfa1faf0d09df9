"""What a finished run says about its cost and its hypergradient, and what it was made with."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from importlib import metadata

import jax

from bilevel_flax import config as configs
from bilevel_flax import health, step_time
from bilevel_flax.base import BilevelSolver, TrainState
from bilevel_flax.loop import Loop
from bilevel_flax.task import Task

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "bilevel-flax")
_ITERATIONS = 30
_MINIBATCHES = (4, 32)  # of a side, at least and at most


def costs(
    config: configs.Config,
    task: Task,
    solver: BilevelSolver,
    loop: Loop,
    state: TrainState,
    units: float,
    say: Callable[[str], None],
) -> dict[str, float]:
    """What a step cost, and how good its direction of x is.

    Args:
        config: the run's; `config.health.summary=False` leaves out what takes time.
        task: the run's.
        solver: the run's.
        loop: the run's.
        state: the last one.
        units: gradient units spent, full passes included.
        say: prints a line.

    Returns:
        `gradient_units_per_step`; `step_seconds_over_plain`, the compiled step's seconds over those
        of a plain Optax step; `hypergradient_cosine`, of D_x at the last v with the reference of
        `diagnostics.hypergradient_check` on held minibatches, and `hypergradient_residual`, how
        far that reference's system is from solved. NaN where there is none: a line says why.
    """
    found = {
        "gradient_units_per_step": units / config.steps,
        "step_seconds_over_plain": math.nan,
        "hypergradient_cosine": math.nan,
        "hypergradient_residual": math.nan,
    }
    settings = config.get("health") or {}
    if not settings.get("summary", True):
        return found
    if "inner" in config.solver:
        inner = configs.resolve(config.solver.inner)
        bilevel, plain = step_time.over_plain(loop, task.problem, inner, state)
        found["step_seconds_over_plain"] = bilevel / plain
    else:
        say("step_seconds_over_plain: none, config.solver names no `inner` to train plainly with")
    affordable = settings.get("share", 0.03) * config.steps * solver.units / (3 * _ITERATIONS)
    least, most = _MINIBATCHES
    check = health.check_on(task, state, min(max(int(affordable), least), most), _ITERATIONS)
    found["hypergradient_cosine"] = check.cosine
    found["hypergradient_residual"] = check.reference_residual
    if not math.isfinite(check.cosine):
        say("hypergradient_cosine: none, D_x is 0 or not finite (does the solver keep an adjoint?)")
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
