"""From a method's name and two step sizes to a solver, for every method of the library.

What a method wants is read from its signature, so a new one joins the bench by being exported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import bilevel_flax
from bilevel_flax.base import BilevelSolver
from bilevel_flax.bench.tasks import BenchTask, Setting
from bilevel_flax.solvers import table
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.train import config as configs


class Decay(NamedTuple):
    """Exponents of the decay of (ρ, γ) in the steps that the authors analyse."""

    inner: float = 0.0
    outer: float = 0.0


# REFERENCES.md; methods that are not listed take constant steps.
DECAYS = {
    "soba": Decay(1 / 2, 1 / 2),
    "masoba": Decay(1 / 2, 1 / 2),
    "fsla": Decay(1 / 2, 1 / 2),
    "bsa": Decay(1 / 2, 1 / 2),
    "ttsa": Decay(2 / 5, 3 / 5),
    "storm": Decay(1 / 3, 1 / 3),
    "mrbo": Decay(1 / 3, 1 / 3),
    "sustain": Decay(1 / 3, 1 / 3),
    "bsg": Decay(0.0, 1.0),
    "bsgo": Decay(0.0, 1.0),
    "grid_search": Decay(1 / 2),
    "random_search": Decay(1 / 2),
}
# Zeroth-order baselines: their runs are searches over x, see `searches`.
SEARCHES: tuple[str, ...] = ("grid_search", "random_search")


def names() -> list[str]:
    """What can run: all exported functions of a problem and two optimisers, and the searches."""
    listed = list(SEARCHES)
    for name in (row.name for row in table.ROWS):
        function = table.method(name)
        if _returns_solver(function):
            parameters = inspect.signature(function).parameters
            if {"problem", "inner", "outer"} <= set(parameters) and "estimator" not in parameters:
                listed.append(name)
    return sorted(listed)


def _returns_solver(function: Callable[..., Any]) -> bool:
    annotation = function.__annotations__.get("return")
    return annotation in ("BilevelSolver", BilevelSolver)


def check_names(wanted: list[str]) -> None:
    """Raises unless every name is a method's, each given once.

    Raises:
        ConfigError: the nearest name is given.
    """
    known = names()
    if not wanted:
        raise configs.ConfigError(f"--solvers is empty: choose some of {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise configs.ConfigError(
                f"solver {name!r} is unknown: choose some of {', '.join(known)}"
                f"{configs.nearest(name, known)}"
            )
        if wanted.count(name) > 1:
            raise configs.ConfigError(f"--solvers names {name} twice: give each once")


def build(name: str, bench_task: BenchTask, rho: Any, ratio: Any) -> BilevelSolver:
    """The solver `name` on a task with the steps ρ and γ = ρ / ratio.

    Args:
        name: one of `names()`; for a search, what trains z at one candidate x.
        bench_task: gives the problem, the data's sizes and the family of optimisers.
        rho: ρ, a number or a traced scalar.
        ratio: ρ / γ, the same.

    Raises:
        ValueError: whatever the solver refuses.
    """
    function = inner_only if name in SEARCHES else table.method(name)
    parameters = inspect.signature(function).parameters
    task = bench_task.task
    total = task.inner.num_batches + task.outer.num_batches
    offered = {
        "num_inner_batches": task.inner.num_batches,
        "num_outer_batches": task.outer.num_batches,
        "inner_weights": task.inner.weights if task.inner.ragged else None,
        "outer_weights": task.outer.weights if task.outer.ragged else None,
        # As many steps between two full passes as a pass has minibatches.
        "period": total,
        "probability": 1 / total,
    }
    settings = {key: value for key, value in offered.items() if key in parameters}
    # Where it is optional, another way to v is the default.
    step = parameters.get("adjoint_step")
    explicit = step is not None and step.default is step.empty
    decay = DECAYS.get(name, Decay())

    def solver(inner, outer, adjoint_step) -> BilevelSolver:
        more: dict[str, Any] = {"outer": outer} if "outer" in parameters else {}
        if explicit:
            # A schedule may be a traced number, a plain step may not.
            more["adjoint_step"] = lambda step: adjoint_step
        return function(problem=task.problem, inner=inner, **more, **settings)

    # What an update costs is known once a solver is built; its optimisers do not matter for that.
    units = solver(optax.sgd(1.0), optax.sgd(1.0), 1e-3).units
    setting = Setting(rho, ratio, *decay, units, explicit, _takes_rows(solver))
    chosen = bench_task.optimizers(setting)
    return solver(chosen.inner, chosen.outer, chosen.adjoint_step)


def _takes_rows(solver: Callable[..., BilevelSolver]) -> bool:
    """Whether the method hands per-sample directions on as rows; those that do not refuse them."""
    try:
        solver(optax.sgd(1.0), bilevel_flax.outer.normalized_sgd(1.0), 1e-3)
    except ValueError:
        return False
    return True
