"""`bilevel-flax bench`: methods on one task, with one budget, one family of optimisers, one loop.

Each method gets the same seconds for a run (compilation and evaluation apart), the same number of
pairs (ρ, ρ/γ) to choose its steps from, and the same data in the same order. The pair is chosen by
the task's own validation metric at the end of a run with seed 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bilevel_flax.bench import folder, methods, report, results, searches, tasks
from bilevel_flax.bench.options import CLOCKS, Options, grid
from bilevel_flax.bench.results import DIVERGED, SCREENED, Key, Row, Runs, params_text
from bilevel_flax.bench.runner import Runner
from bilevel_flax.bench.tasks import BenchTask, Context
from bilevel_flax.distribution import shipped
from bilevel_flax.train.config import imported


def run(options: Options, say: Callable[[str], None] = print) -> Any:
    """Runs what is missing in `options.out`, then writes the table and `bench.html`.

    A task that is judged by something else than a value along a run has a protocol of its own
    (`tasks.PROTOCOLS`), which is handed everything.

    Args:
        options: what to compare.
        say: prints a line.

    Returns:
        The chosen runs of every method, as they stand in `results.csv` (`Runs`).

    Raises:
        ConfigError: a mistake in the options, a folder that holds another bench, a budget in which
            a method cannot take one step.
    """
    options.check_shared()
    if options.task in tasks.PROTOCOLS:
        shipped.make_importable()
        return imported(tasks.PROTOCOLS[options.task])(options, say)
    return _compare(options, say)


def _compare(options: Options, say: Callable[[str], None]) -> Runs:
    options.check()
    seeds = 1 if options.seeds is None else options.seeds
    maker = _TaskMaker(options, say)
    seconds = options.seconds if options.seconds is not None else maker(0).seconds
    _claim(options, seconds)
    path = options.out / "results.csv"
    done = results.read(path)
    results.write(path, done)

    runner = Runner(seconds, options.clock)

    def ensure(solver: str, seed: int, pair: tuple[float, float], where: str, screening=False):
        key = Key(solver, seed, params_text(*pair))
        rows = done.get(key)
        if rows is None or (rows[-1].status == SCREENED and not screening):
            say(f"[{where}] {solver}, seed {seed}, {key.params}")
            fresh = runner.run(maker(seed), key, pair, screening)
            if rows is None:
                done[key] = fresh
                results.append(path, fresh)
            else:  # a pair of the grid, measured anew at more times
                score = results.score(rows)
                done[key] = [dataclasses.replace(row, screened=score) for row in fresh]
                results.write(path, done)
            say(_last_line(done[key], maker(seed).quantity))
        return done[key]

    for solver in set(options.solvers) & set(methods.SEARCHES):
        searches.check(solver, maker(0))
    chosen: Runs = {}
    searched = grid(options.grid)
    per_solver = len(searched) + seeds
    for number, solver in enumerate(options.solvers):
        before, total = number * per_solver, len(options.solvers) * per_solver
        pairs = searched or [maker(0).tuned.get(solver, maker(0).default)]
        scores = []
        for count, pair in enumerate(searched, start=before + 1):
            scores.append(results.score(ensure(solver, 0, pair, f"{count}/{total}", True)))
        best = pairs[int(np.argmin(scores))] if scores else pairs[0]
        for seed in range(seeds):
            where = f"{before + len(searched) + seed + 1}/{total}"
            key = Key(solver, seed, params_text(*best))
            chosen[key] = ensure(solver, seed, best, where)
    runner.close()
    report.write(options.out, maker(0), chosen, done, seconds, options.clock, options.grid)
    say(report.table_text(maker(0), chosen, CLOCKS[options.clock]))
    say(f"{path}, {options.out / 'bench.html'}")
    return chosen


class _TaskMaker:
    """The task for a seed, made once."""

    def __init__(self, options: Options, say: Callable[[str], None]):
        self._options, self._say = options, say
        self._seed, self._made = -1, None

    def __call__(self, seed: int) -> BenchTask:
        # Two at a time would hold the data twice.
        if self._made is None or self._seed != seed:
            options, self._made = self._options, None
            context = Context(seed, options.manual_dir, options.out, self._say)
            self._made, self._seed = tasks.make(options.task, context), seed
        return self._made


def _claim(options: Options, seconds: float) -> None:
    content = {
        "task": options.task,
        "seconds": seconds,
        "clock": options.clock,
        "float": str(jax.dtypes.canonicalize_dtype(float)),
        "full_data": options.manual_dir is not None,
    }
    folder.claim(options.out, content)


def _last_line(rows: Sequence[Row], quantity: str) -> str:
    last = rows[-1]
    if last.status == DIVERGED:
        good = [row.gap for row in rows[:-1]]
        best = f"; best {quantity} before {min(good):.3g}" if good else ""
        return f"    diverged at step {last.iteration:,} after {last.seconds:.3g} s{best}"
    return (
        f"    {quantity} {last.gap:.3g} after {last.seconds:.3g} s ({last.cpu_seconds:.3g} s of "
        f"CPU time), {last.iteration:,} steps, {last.oracle_units:.3g} units"
    )
