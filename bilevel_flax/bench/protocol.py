"""`bilevel-flax bench`: methods on one task, with one budget, one family of optimisers, one loop.

Each method gets the same seconds for a run (compilation and evaluation apart), the same number of
pairs (ρ, ρ/γ) to choose its steps from, and the same data in the same order. The pair is chosen by
the task's own validation metric at the end of a run with seed 0.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bilevel_flax.bench import folder, methods, report, results, searches, tasks
from bilevel_flax.bench.options import CLOCKS, SOLVERS, Options, grid
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
    options, solvers = options.with_solvers(SOLVERS)
    options.check()
    with folder.lock(options.out):
        bench = _Bench(options, solvers, say)
        chosen: Runs = {}
        for number, solver in enumerate(solvers):
            chosen |= bench.choose_and_run(solver, number)
        bench.finish(chosen)
    return chosen


class _Bench:
    """One folder's runs: those that are there, and those that are missing."""

    def __init__(self, options: Options, solvers: tuple[str, ...], say: Callable[[str], None]):
        self._options, self._solvers, self._say = options, solvers, say
        self._path = options.out / "results.csv"
        # Before the task is made: that may take minutes and leave files in the folder.
        asked = {
            "task": options.task,
            "clock": options.clock,
            "float": str(jax.dtypes.canonicalize_dtype(float)),
            "grid": options.grid,
        }
        folder.check_same_bench(options.out, asked)
        self._done = results.read(self._path)
        self._task_of = _TaskMaker(options, say)
        task = self._task_of(0)
        self._seconds = task.seconds if options.seconds is None else options.seconds
        folder.claim(options.out, {**asked, "seconds": self._seconds, "data": _checksum(task)})
        for solver in set(solvers) & set(methods.SEARCHES):
            searches.check(solver, task)
        self._runner = Runner(self._seconds, options.clock)
        self._pairs = grid(options.grid)
        self._seeds = 1 if options.seeds is None else options.seeds
        self._update_gaps()

    def choose_and_run(self, solver: str, number: int) -> Runs:
        """Tries the pairs of the grid on one method, then runs all seeds with the best.

        Args:
            solver: its name.
            number: of methods before it.
        """
        per_solver = len(self._pairs) + self._seeds
        before, total = number * per_solver, len(self._solvers) * per_solver
        pair, scores = self._task_of(0).tuned.get(solver, self._task_of(0).default), []
        for count, candidate in enumerate(self._pairs, start=before + 1):
            rows = self._ensure(solver, 0, candidate, f"{count}/{total}", screening=True)
            scores.append(results.score(rows))
        if scores:
            pair = self._pairs[int(np.argmin(scores))]
        done: Runs = {}
        for seed in range(self._seeds):
            where = f"{before + len(self._pairs) + seed + 1}/{total}"
            key = Key(solver, seed, params_text(*pair))
            done[key] = self._ensure(solver, seed, pair, where)
        return done

    def finish(self, chosen: Runs) -> None:
        """Writes the report of the chosen runs, and says what it says."""
        self._runner.close()
        self._update_gaps()
        chosen |= {key: self._done[key] for key in chosen}
        options, task = self._options, self._task_of(0)
        report.write(
            options.out, task, chosen, self._done, self._seconds, options.clock, options.grid
        )
        found = report.table(task, chosen, CLOCKS[options.clock])
        self._say(report.shown(*found, options.markdown))
        self._say(f"{self._path}, {options.out / 'bench.html'}")

    def _ensure(
        self, solver: str, seed: int, pair: tuple[float, float], where: str, screening: bool = False
    ) -> list[Row]:
        """The rows of a run, done now unless it is there."""
        key = Key(solver, seed, params_text(*pair))
        rows = self._done.get(key)
        if rows is None or (rows[-1].status == SCREENED and not screening):
            self._say(f"[{where}] {solver}, seed {seed}, {key.params}")
            fresh = self._runner.run(self._task_of(seed), key, pair, screening)
            if rows is None:
                self._done[key] = fresh
                results.append(self._path, fresh)
            else:  # a pair of the grid, measured anew at more times
                score = results.score(rows)
                self._done[key] = [dataclasses.replace(row, screened=score) for row in fresh]
                results.write(self._path, self._done)
            self._say(_last_line(self._done[key], self._task_of(seed).quantity))
        return self._done[key]

    def _update_gaps(self) -> None:
        """Measures all runs against the best value known by now, which a run may have found."""
        best = self._task_of(0).best()
        self._done = {key: results.with_gaps(rows, best) for key, rows in self._done.items()}
        results.write(self._path, self._done)


def _checksum(task: BenchTask) -> str:
    """Of all examples of both losses, in the order of seed 0."""
    sides = (task.task.inner, task.task.outer)
    checksum = 0
    for leaf in jax.tree.leaves([(side.batches, side.weights) for side in sides]):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), checksum)
    return f"{checksum:08x}"


class _TaskMaker:
    """The task for a seed, made once."""

    def __init__(self, options: Options, say: Callable[[str], None]):
        self._options, self._say = options, say
        self._seed, self._task = -1, None

    def __call__(self, seed: int) -> BenchTask:
        # Two at a time would hold the data twice.
        if self._task is None or self._seed != seed:
            options, self._task = self._options, None
            context = Context(seed, options.manual_dir, options.out, self._say)
            self._task, self._seed = tasks.make(options.task, context), seed
        return self._task


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
