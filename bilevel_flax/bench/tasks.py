"""What the bench compares methods on: a task, how to measure a run, which steps to search over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from bilevel_flax.base import TrainState
from bilevel_flax.distribution import shipped
from bilevel_flax.train import config as configs
from bilevel_flax.train.task import Task

# Names on the command line, and the function that makes each: `make(name, context) -> BenchTask`.
TASKS = {
    "quadratics": "benchmarks.tasks.quadratics:make",
    "breast_cancer": "examples.hyperparameter_selection.bench:make",
    "ijcnn1": "examples.hyperparameter_selection.bench:make",
    "covtype": "examples.hyperparameter_selection.bench:make",
    "covtype10k": "examples.hyperparameter_selection.bench:make",
    "mnist_hypercleaning": "benchmarks.tasks.hypercleaning:make",
    "mnist_hypercleaning_p70": "benchmarks.tasks.hypercleaning:make",
    "mnist_hypercleaning_p90": "benchmarks.tasks.hypercleaning:make",
}
# Tasks with a protocol, and columns, of their own: `run(options, say)`.
PROTOCOLS = {
    "cleaning": "examples.mnist_hypercleaning.bench:run",
    "darts_micro": "examples.darts.micro.bench:run",
}


class Context(NamedTuple):
    """What a task is made from.

    Attributes:
        seed: of the run: the order of the minibatches, and whatever the task draws.
        manual_dir: folder of original data files, or None.
        out: the bench's folder, where a task may cache what is expensive.
        say: prints a line.
    """

    seed: int
    manual_dir: str | None
    out: Path
    say: Callable[[str], None]


class Setting(NamedTuple):
    """A method's steps, in the terms that all methods share.

    Attributes:
        rho: ρ, the step of z and v.
        ratio: ρ / γ, with γ the step of x.
        inner_decay: exponent of the decay of ρ that the method's authors analyse; 0 is constant.
        outer_decay: the same for γ.
        units: gradient units of one update.
        explicit_adjoint: v comes from a series with the scalar step ρ, not from an optimiser.
        sparse_outer: a row-sparse optimiser may be used for x.
    """

    rho: float
    ratio: float
    inner_decay: float
    outer_decay: float
    units: float
    explicit_adjoint: bool
    sparse_outer: bool


class Optimizers(NamedTuple):
    """What a setting becomes on a task: the same family of optimisers for every method."""

    inner: optax.GradientTransformation
    outer: optax.GradientTransformation
    adjoint_step: float


class Measured(NamedTuple):
    """A point's quality.

    Attributes:
        value: what the task is judged by: h, or the test error in [0, 1].
        validation: what steps are selected by; lower is better.
    """

    value: float
    validation: float


class BenchTask(NamedTuple):
    """A task as the bench runs it.

    Attributes:
        name: on the command line.
        task: problem, data, start.
        measure: `measure(state) -> Measured`.
        optimizers: `optimizers(setting) -> Optimizers`.
        quantity: what `value - best()` is, for axes and tables.
        unit: what it is measured in, as `Task.units`; "fraction" is shown in percent.
        default: (ρ, ratio) for all other solvers.
        seconds: the default budget of a run.
        tuned: (ρ, ratio) by solver, as an earlier grid of this bench found them: `make` fills it.
        best: `best()` is the lowest value there is, as far as is known by now: runs are asked
            after, too, for a search of h* need not find the lowest of many minima. 0, the default:
            the value itself is the gap.
        box: (low, high) of every entry of x, where searches look for it; None: a search over x is
            hopeless on this task.
        published: header and rows of published results, to be shown beside ours.
        published_note: how these were obtained.
        published_finals: the published final value by solver, for the table of ours.
    """

    name: str
    task: Task
    measure: Callable[[TrainState], Measured]
    optimizers: Callable[[Setting], Optimizers]
    quantity: str
    default: tuple[float, float]
    seconds: float = 30.0
    unit: str = ""
    tuned: Mapping[str, tuple[float, float]] = MappingProxyType({})
    best: Callable[[], float] = lambda: 0.0
    box: tuple[float, float] | None = None
    published: tuple[Sequence[str], Sequence[Sequence[Any]]] = ((), ())
    published_note: str = ""
    published_finals: Mapping[str, str] = MappingProxyType({})


def check_name(name: str) -> None:
    """Raises unless `name` is a task's.

    Raises:
        ConfigError: the nearest name is given.
    """
    known = [*TASKS, *PROTOCOLS]
    if name not in known:
        raise configs.ConfigError(
            f"bench task {name!r} is unknown: choose one of {', '.join(known)}"
            f"{configs.nearest(name, known)}"
        )


def make(name: str, context: Context) -> BenchTask:
    """Makes the task called `name`.

    Raises:
        ConfigError: unknown name; missing data.
    """
    check_name(name)
    shipped.make_importable()
    task = configs.imported(TASKS[name])(name, context)
    return task._replace(tuned=configs.imported("benchmarks.tasks.tuned:TUNED").get(name, {}))
