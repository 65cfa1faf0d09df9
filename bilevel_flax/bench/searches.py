"""Grid and random search over x as runs of the bench: zeroth-order, with a method's whole budget.

A trial trains z from its start with x fixed, by the inner optimiser of the methods, and is judged
by F on the whole outer data; both are timed and counted. The candidates divide the budget evenly.

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

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import TrainState
from bilevel_flax.bench.one_run import Run
from bilevel_flax.bench.results import DIVERGED, Row
from bilevel_flax.bench.search_baselines import grid_search, random_search
from bilevel_flax.bench.tasks import BenchTask
from bilevel_flax.train.config import ConfigError

_CANDIDATES = 30


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
    """The rows of a search: those of the best x so far.

    Raises:
        ConfigError: the budget is over before the first step, or the task has no box.
    """
    check(run.key.solver, run.bench_task)
    rows = [run.row(run.start(run.outer_params))]
    judge = _Judge(run)
    least = _one_step(run, judge)
    best = (math.inf, run.start(run.outer_params))

    def evaluate(params: dict[str, Any], budget: float) -> float:
        nonlocal best
        end = run.spent + budget
        state, alive = _train(run, run.start(judge.filled(params["x"])), end - judge.seconds)
        value = judge(state) if alive else math.inf
        if value < best[0]:
            best = (value, state)
        if run.is_due() and math.isfinite(best[0]):
            rows.append(run.row(best[1]))
        return value

    try:
        _search(run, judge.size, evaluate, least)
    except ValueError as error:
        if run.step == 0:
            raise ConfigError(f"--seconds={run.seconds:g}, {run.key.solver}: {error}") from error
        if math.isfinite(best[0]):
            raise
    yield from rows
    yield run.row(best[1], run.end if math.isfinite(best[0]) else DIVERGED)


def _search(run: Run, size: int, evaluate: Callable[..., float], least: float) -> None:
    low, high = run.bench_task.box or (0.0, 0.0)
    count = candidates(run.ratio)
    if run.key.solver == "grid_search":
        grid_search(
            evaluate, {"x": np.linspace(low, high, count).tolist()}, run.seconds, least=least
        )
    else:
        space = {"x": lambda rng: rng.uniform(low, high, size)}
        seed = run.key.seed
        random_search(evaluate, space, run.seconds, trials=count, seed=seed, least=least)


def _one_step(run: Run, judge: _Judge) -> float:
    """Seconds of the smallest trial; compiles, and leaves the clocks at zero."""
    for _ in range(2):  # the first one is slower
        before = run.spent
        state, _, _ = run.advance(run.start(run.outer_params), 0, 1)
        judge(state)
        least = run.spent - before
    run.loop.rewind()
    run.step, run.units = 0, 0.0
    return least


def _train(run: Run, state: TrainState, end: float) -> tuple[TrainState, bool]:
    """Trains z until the clock shows `end`, for one step at least."""
    began, done, alive = run.spent, 0, True
    while alive:
        pace = (run.spent - began) / done if done else 0.0
        count = int((end - run.spent) / pace) if pace else 1
        if done and count < 1:
            break
        state, taken, alive = run.advance(state, done, done + max(count, 1))
        done += taken
    return state, alive


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

    def filled(self, values: Any) -> Any:
        """An x from one value for all entries, or one for each."""
        return self._unravel(jnp.broadcast_to(jnp.asarray(values, self._dtype), (self.size,)))

    def __call__(self, state: TrainState) -> float:
        loop = self._run.loop
        before, began, cpu_began = self._run.spent, time.perf_counter(), time.process_time()
        value = float(self._mean(state.inner_params, state.outer_params, self._data))
        loop.seconds += time.perf_counter() - began
        loop.cpu_seconds += time.process_time() - cpu_began
        self.seconds = self._run.spent - before
        self._run.units += self._count
        return value
