"""Grid and random search over x: the zeroth-order baselines, with the budget of one bilevel run.

A search compares whole runs of plain training: there is no state to step and no direction to take,
so it is a function of runs and no `BilevelSolver`. Fairness is in the budget: the whole search
spends what one bilevel run spends, and each of its n trials is handed an n-th of it.

On the bench a trial trains z from its start with x fixed, by the inner optimiser of the methods,
and is judged by F on the whole outer data; both are timed and counted.

* `grid_search`: one value shared by all entries of x, on a regular grid of the task's box. A grid
  over every entry would need 10²² points for 22 penalties.
* `random_search`: every entry drawn uniformly from the box.

How many candidates is a choice as that of γ is for the other methods: few candidates with many
inner steps each, or many with few. ρ / γ decides it: 30 / √(ρ/γ) candidates, 9 to 300 on the grid
of pairs.

References:
    J. Bergstra, Y. Bengio. Random search for hyper-parameter optimization. JMLR 2012.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from bilevel_flax import deprecated
from bilevel_flax.base import TrainState
from bilevel_flax.bench.one_run import Run
from bilevel_flax.bench.results import DIVERGED, Row
from bilevel_flax.bench.tasks import BenchTask
from bilevel_flax.checks import check_count
from bilevel_flax.train.config import ConfigError

Evaluate = Callable[[dict[str, Any], float], float]
_CANDIDATES = 30


class Trial(NamedTuple):
    """One run: its hyperparameters, what it was allowed to spend, the loss that it reached."""

    params: dict[str, Any]
    budget: float
    value: float


class Search(NamedTuple):
    """The trial with the lowest value (the first of equals), and all of them in order."""

    best: Trial
    history: tuple[Trial, ...]


@deprecated.renamed_arguments(least="min_share")
def grid_search(
    evaluate: Evaluate,
    grid: Mapping[str, Sequence[Any]],
    budget: float,
    *,
    min_share: float = 0.0,
) -> Search:
    """Every combination of the grid's values, each with an equal share of the budget.

    Args:
        evaluate: `evaluate(params, budget) -> float`: trains with fixed hyperparameters, spends at
            most `budget`, returns the outer loss (lower is better; not finite: diverged).
        grid: the values of each hyperparameter, by name.
        budget: of the whole search, in the caller's unit (seconds, oracle units, steps).
        min_share: what one step of a run takes; a smaller share is an error.

    Returns:
        The best trial and the history, in the order of `itertools.product`.

    Raises:
        ValueError: an empty grid, a budget too small for one step a trial, or no finite value.

    Example:
        >>> search = grid_search(lambda p, budget: (p["x"] - 2) ** 2, {"x": [0, 1, 2, 3]}, 40.0)
        >>> search.best
        Trial(params={'x': 2}, budget=10.0, value=0.0)
    """
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError(f"grid must give at least one value for each name, got {dict(grid)!r}")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return _search(evaluate, points, budget, min_share)


@deprecated.renamed_arguments(least="min_share")
def random_search(
    evaluate: Evaluate,
    space: Mapping[str, tuple[float, float] | Callable[[np.random.Generator], Any]],
    budget: float,
    *,
    trials: int,
    seed: int = 0,
    min_share: float = 0.0,
) -> Search:
    """Independent draws of the hyperparameters, each with an equal share of the budget.

    Args:
        evaluate: as for `grid_search`.
        space: by name, an interval (low, high) drawn from uniformly (search a step size by its
            exponent), or a function of a NumPy generator.
        budget: of the whole search, in the caller's unit.
        trials: draws, at least 1.
        seed: of the draws.
        min_share: what one step of a run takes; a smaller share is an error.

    Returns:
        The best trial and the history, in the order of the draws.

    Raises:
        ValueError: an empty space or interval, `trials` below 1, a budget too small for one step
            a trial, or no finite value.

    Example:
        >>> space = {"x": (0.0, 4.0)}
        >>> search = random_search(lambda p, budget: (p["x"] - 2) ** 2, space, 60.0, trials=30)
        >>> abs(search.best.params["x"] - 2) < 0.5, search.best.budget
        (True, 2.0)
    """
    check_count("trials", trials)
    if not space:
        raise ValueError("space is empty: give (low, high) or a function for each name")
    for name, entry in space.items():
        if not callable(entry) and not (len(entry) == 2 and entry[0] < entry[1]):
            raise ValueError(f"space[{name!r}] must be (low, high) with low < high, got {entry!r}")
    rng = np.random.default_rng(seed)
    draw = lambda entry: entry(rng) if callable(entry) else float(rng.uniform(*entry))
    points = [{name: draw(entry) for name, entry in space.items()} for _ in range(trials)]
    return _search(evaluate, points, budget, min_share)


def _search(
    evaluate: Evaluate, points: list[dict[str, Any]], budget: float, min_share: float
) -> Search:
    if not math.isfinite(budget) or budget <= 0:
        raise ValueError(f"budget must be a positive finite number, got {budget!r}")
    share = budget / len(points)
    if share < min_share:
        raise ValueError(
            f"budget={budget:g} over {len(points)} trials leaves {share:g} for each, and one step "
            f"takes {min_share:g}: raise the budget or search fewer points"
        )
    trials = tuple(Trial(point, share, float(evaluate(dict(point), share))) for point in points)
    # A run that diverged, to whichever side, is in the history and never the best.
    order = [trial.value if math.isfinite(trial.value) else math.inf for trial in trials]
    if min(order) == math.inf:
        raise ValueError(f"all {len(trials)} trials diverged: widen the search to smaller values")
    return Search(trials[order.index(min(order))], trials)


def check(name: str, bench_task: BenchTask) -> None:
    """Raises where a search has nothing to offer.

    Raises:
        ConfigError: says why.
    """
    if bench_task.box is None:
        raise ConfigError(
            f"--solvers={name} makes no sense on {bench_task.name}: x has a weight for every "
            "training example, a shared value cannot tell wrong labels from right ones and random "
            "draws would not find them; leave it out"
        )


def candidates(ratio: float) -> int:
    """How many x a search tries.

    >>> [candidates(ratio) for ratio in (0.01, 1.0, 10.0)]
    [300, 30, 9]
    """
    return max(2, round(_CANDIDATES / math.sqrt(ratio)))


def walk(run: Run) -> Iterator[Row]:
    """The rows of a search on the bench: those of the best x so far.

    Raises:
        ConfigError: the budget is over before the first step, or the task has no box.
    """
    check(run.key.solver, run.bench_task)
    low, high = run.bench_task.box or (0.0, 0.0)
    rows = [run.row(run.start(run.outer_params))]
    judge = _Judge(run)
    min_share = _one_step(run, judge)
    best = (math.inf, run.start(run.outer_params))

    def evaluate(params: dict[str, Any], budget: float) -> float:
        nonlocal best
        end = run.spent + budget
        state, finite = _train(run, run.start(judge.unravel(params["x"])), end - judge.seconds)
        value = judge(state) if finite else math.inf
        if value < best[0]:
            best = (value, state)
        if run.is_due() and math.isfinite(best[0]):
            rows.append(run.row(best[1]))
        return value

    count, budget = candidates(run.ratio), run.seconds
    try:
        if run.key.solver == "grid_search":
            grid = {"x": np.linspace(low, high, count).tolist()}
            grid_search(evaluate, grid, budget, min_share=min_share)
        else:
            space = {"x": lambda rng: rng.uniform(low, high, judge.size)}
            draws = {"trials": count, "seed": run.key.seed}
            random_search(evaluate, space, budget, min_share=min_share, **draws)
    except ValueError as error:
        if run.step == 0:
            raise ConfigError(f"--seconds={run.seconds:g}, {run.key.solver}: {error}") from error
        if math.isfinite(best[0]):
            raise
    yield from rows
    yield run.row(best[1], run.end if math.isfinite(best[0]) else DIVERGED)


def _one_step(run: Run, judge: _Judge) -> float:
    """Seconds of the smallest trial; compiles, and leaves the clocks at zero."""
    seconds = math.inf
    for _ in range(2):  # the first one is slower
        before = run.spent
        state, _, _ = run.advance(run.start(run.outer_params), 0, 1)
        judge(state)
        seconds = run.spent - before
    run.runner.rewind()
    run.step, run.units = 0, 0.0
    return seconds


def _train(run: Run, state: TrainState, end: float) -> tuple[TrainState, bool]:
    """Trains z until the clock shows `end`, for one step at least."""
    began, done, finite = run.spent, 0, True
    while finite:
        pace = (run.spent - began) / done if done else 0.0
        count = int((end - run.spent) / pace) if pace else 1
        if done and count < 1:
            break
        state, taken, finite = run.advance(state, done, done + max(count, 1))
        done += taken
    return state, finite


class _Judge:
    """F on the whole outer data, timed by the run's clocks and counted: a unit a minibatch.

    Attributes:
        size: entries of x.
        seconds: what the last call took.
    """

    def __init__(self, run: Run):
        self._run, self.seconds = run, 0.0
        task = run.bench_task.task
        self._count = task.outer.num_batches
        flat, self._unravel = jax.flatten_util.ravel_pytree(run.outer_params)
        self.size, self._dtype = flat.size, flat.dtype
        self._data = jax.device_put((task.outer.batches, task.outer.weights))

        def mean(z, x, data):
            batches, weights = data
            losses = jax.lax.map(lambda batch: task.problem.outer_loss(z, x, batch), batches)
            return jnp.sum(weights * losses)

        example = run.start(run.outer_params)
        arguments = (example.inner_params, example.outer_params, self._data)
        self._mean = jax.jit(mean).lower(*arguments).compile()

    def unravel(self, values: Any) -> Any:
        """An x from one value for all entries, or one for each."""
        return self._unravel(jnp.broadcast_to(jnp.asarray(values, self._dtype), (self.size,)))

    def __call__(self, state: TrainState) -> float:
        before = self._run.spent
        with self._run.runner.clocks_running():
            value = float(self._mean(state.inner_params, state.outer_params, self._data))
        self.seconds = self._run.spent - before
        self._run.units += self._count
        return value
