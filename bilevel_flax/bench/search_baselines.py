"""Grid and random search: the zeroth-order baselines, with the budget of one bilevel run.

A search compares whole runs of plain training, so it is a function of runs and no `BilevelSolver`:
there is no state to step and no direction to take. Fairness is in the budget. The whole search
may spend what one bilevel run spends (seconds, oracle units, steps: the caller's unit), and each
of its n trials is handed an n-th of it.

References:
    J. Bergstra, Y. Bengio. Random search for hyper-parameter optimization. JMLR 2012.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Evaluate = Callable[[dict[str, Any], float], float]


class Trial(NamedTuple):
    """One run: its hyperparameters, what it was allowed to spend, the loss that it reached."""

    params: dict[str, Any]
    budget: float
    value: float


class Search(NamedTuple):
    """The trial with the lowest value (the first of equals), and all of them in order."""

    best: Trial
    history: tuple[Trial, ...]


def _search(evaluate: Evaluate, points: list[dict[str, Any]], budget: float, least: float):
    if not math.isfinite(budget) or budget <= 0:
        raise ValueError(f"budget must be a positive finite number, got {budget!r}")
    share = budget / len(points)
    if share < least:
        raise ValueError(
            f"budget={budget:g} over {len(points)} trials leaves {share:g} for each, and one step "
            f"takes {least:g}: raise the budget or search fewer points"
        )
    trials = tuple(Trial(point, share, float(evaluate(dict(point), share))) for point in points)
    # A run that diverged is kept in the history and never the best.
    order = [trial.value if math.isfinite(trial.value) else math.inf for trial in trials]
    if min(order) == math.inf:
        raise ValueError(f"all {len(trials)} trials diverged: widen the search to smaller values")
    return Search(trials[order.index(min(order))], trials)


def grid_search(
    evaluate: Evaluate,
    grid: Mapping[str, Sequence[Any]],
    budget: float,
    *,
    least: float = 0.0,
) -> Search:
    """Every combination of the grid's values, each with an equal share of the budget.

    Args:
        evaluate: `evaluate(params, budget) -> float`: trains with fixed hyperparameters, spends at
            most `budget`, returns the outer loss (lower is better; not finite: diverged).
        grid: the values of each hyperparameter, by name.
        budget: of the whole search, in the caller's unit.
        least: what one step of a run takes; a smaller share is an error.

    Returns:
        The best trial and the history, in the order of `itertools.product`.

    Raises:
        ValueError: an empty grid, a budget too small for one step a trial, or no finite value.

    Example:
        >>> found = grid_search(lambda p, budget: (p["x"] - 2) ** 2, {"x": [0, 1, 2, 3]}, 40.0)
        >>> found.best
        Trial(params={'x': 2}, budget=10.0, value=0.0)
    """
    empty = [name for name, values in grid.items() if not len(values)]
    if not grid or empty:
        raise ValueError(f"grid must give at least one value for each name, got {dict(grid)!r}")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return _search(evaluate, points, budget, least)


def random_search(
    evaluate: Evaluate,
    space: Mapping[str, tuple[float, float] | Callable[[np.random.Generator], Any]],
    budget: float,
    *,
    trials: int,
    seed: int = 0,
    least: float = 0.0,
) -> Search:
    """Independent draws of the hyperparameters, each with an equal share of the budget.

    Args:
        evaluate: as for `grid_search`.
        space: by name, an interval (low, high) drawn from uniformly (search a step size by its
            exponent), or a function of a NumPy generator.
        budget: of the whole search, in the caller's unit.
        trials: draws, at least 1.
        seed: of the draws.
        least: what one step of a run takes; a smaller share is an error.

    Returns:
        The best trial and the history, in the order of the draws.

    Raises:
        ValueError: an empty space or interval, `trials` below 1, a budget too small for one step
            a trial, or no finite value.

    Example:
        >>> space = {"x": (0.0, 4.0)}
        >>> found = random_search(lambda p, budget: (p["x"] - 2) ** 2, space, 60.0, trials=30)
        >>> abs(found.best.params["x"] - 2) < 0.5, found.best.budget
        (True, 2.0)
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials must be an integer of at least 1, got {trials!r}")
    if not space:
        raise ValueError("space is empty: give (low, high) or a function for each name")
    for name, entry in space.items():
        if not callable(entry) and not (len(entry) == 2 and entry[0] < entry[1]):
            raise ValueError(f"space[{name!r}] must be (low, high) with low < high, got {entry!r}")
    rng = np.random.default_rng(seed)

    def draw(entry):
        return entry(rng) if callable(entry) else float(rng.uniform(*entry))

    points = [{name: draw(entry) for name, entry in space.items()} for _ in range(trials)]
    return _search(evaluate, points, budget, least)
