"""`bilevel-flax bench`: methods on one task, with one budget, one family of optimisers, one loop.

Each method gets the same seconds for a run (compilation and evaluation apart), the same number of
pairs (ρ, ρ/γ) to choose its steps from, and the same data in the same order. The pair is chosen by
the task's own validation metric at the end of a run with seed 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel_flax import bench_report, bench_results, bench_solvers, bench_tasks
from bilevel_flax.base import BilevelSolver
from bilevel_flax.bench_results import DIVERGED, FINISHED, Key, Row, Runs, params_text
from bilevel_flax.bench_tasks import BenchTask, Context
from bilevel_flax.config import ConfigError
from bilevel_flax.loop import Loop

CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
RHOS = tuple(2.0**k for k in range(-5, 4))
RATIOS = tuple(10 ** (k / 2) for k in range(-4, 3))
_EVALUATIONS = 40  # of a run, at times spaced evenly in their logarithm
_FIRST_EVALUATION = 1 / 500  # of the budget
_CHUNK_STEPS = 4000


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        task: name of the task.
        solvers: names of the methods.
        out: the folder for results.
        seconds: budget of a run; None: the task's own.
        seeds: runs with the chosen steps, seeds 0, 1, ...
        grid: pairs (ρ, ρ/γ) that each method chooses from; 0 takes the recorded pair.
        manual_dir: folder of original data files.
        clock: "wall" or "cpu", what the budget is counted in.
    """

    task: str
    solvers: tuple[str, ...]
    out: Path
    seconds: float | None = None
    seeds: int = 1
    grid: int = 0
    manual_dir: str | None = None
    clock: str = "wall"

    def check(self) -> None:
        """Raises on a mistake.

        Raises:
            ConfigError: names the option, its value and the fix.
        """
        bench_tasks.check_name(self.task)
        bench_solvers.check_names(list(self.solvers))
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ConfigError(f"--seconds={self.seconds}: give a positive number of seconds")
        if self.seeds < 1:
            raise ConfigError(f"--seeds={self.seeds}: give 1 or more")
        if not 0 <= self.grid <= len(RHOS) * len(RATIOS):
            raise ConfigError(
                f"--grid={self.grid}: there are {len(RHOS) * len(RATIOS)} pairs of steps; give a "
                "number up to that, or 0 for the recorded pair"
            )
        if self.clock not in CLOCKS:
            raise ConfigError(f"--clock={self.clock}: choose one of {', '.join(CLOCKS)}")
        if self.manual_dir is not None and not Path(self.manual_dir).expanduser().is_dir():
            raise ConfigError(f"--manual-dir={self.manual_dir}: no such folder")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out={self.out}: a file is in the way, choose a folder")


def grid(count: int) -> list[tuple[float, float]]:
    """`count` of the 63 published pairs (ρ, ρ/γ); a larger grid contains the smaller ones.

    >>> len(set(grid(63))), grid(5) == grid(9)[:5]
    (63, True)
    """
    pairs = [(rho, ratio) for rho in RHOS for ratio in RATIOS]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i] for i in order[:count]]


def run(options: Options, say: Callable[[str], None] = print) -> Runs:
    """Runs what is missing in `options.out`, then writes the table and `bench.html`.

    Args:
        options: what to compare.
        say: prints a line.

    Returns:
        The chosen runs of every method, as they stand in `results.csv`.

    Raises:
        ConfigError: a mistake in the options, a folder that holds another bench, a budget in which
            a method cannot take one step.
    """
    options.check()
    maker = _TaskMaker(options, say)
    seconds = options.seconds if options.seconds is not None else maker(0).seconds
    _claim(options, seconds)
    path = options.out / "results.csv"
    done = bench_results.read(path)
    bench_results.write(path, done)

    def ensure(solver: str, seed: int, pair: tuple[float, float], where: str) -> list[Row]:
        key = Key(solver, seed, params_text(*pair))
        if key not in done:
            say(f"[{where}] {solver}, seed {seed}, {key.params}")
            rows = run_one(maker(seed), key, pair, seconds, options.clock)
            bench_results.append(path, rows)
            done[key] = rows
            say(_last_line(rows, maker(seed).quantity))
        return done[key]

    chosen: Runs = {}
    searched = grid(options.grid)
    per_solver = len(searched) + options.seeds
    for number, solver in enumerate(options.solvers):
        before, total = number * per_solver, len(options.solvers) * per_solver
        pairs = searched or [maker(0).tuned.get(solver, maker(0).default)]
        scores = []
        for count, pair in enumerate(searched, start=before + 1):
            scores.append(bench_results.score(ensure(solver, 0, pair, f"{count}/{total}")))
        best = pairs[int(np.argmin(scores))] if scores else pairs[0]
        for seed in range(options.seeds):
            where = f"{before + len(searched) + seed + 1}/{total}"
            key = Key(solver, seed, params_text(*best))
            chosen[key] = ensure(solver, seed, best, where)
    bench_report.write(options.out, maker(0), chosen, done, seconds, options.clock, options.grid)
    say(bench_report.table_text(maker(0), chosen, CLOCKS[options.clock]))
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
            self._made, self._seed = bench_tasks.make(options.task, context), seed
        return self._made


def _claim(options: Options, seconds: float) -> None:
    """Makes the folder this bench's own: rows of different budgets must not be compared."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bench.json"
    content: dict[str, Any] = {
        "task": options.task,
        "seconds": seconds,
        "clock": options.clock,
        "float": str(jax.dtypes.canonicalize_dtype(float)),
        "full_data": options.manual_dir is not None,
    }
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}): use another --out") from error
        different = [
            f"{key} {before.get(key)!r}, not {value!r}"
            for key, value in content.items()
            if before.get(key) != value
        ]
        if different:
            raise ConfigError(
                f"--out={options.out} holds another bench ({'; '.join(different)}): give the same "
                "options to go on with it, or another --out"
            )
    else:
        path.write_text(json.dumps(content, indent=2) + "\n")


def run_one(
    bench_task: BenchTask, key: Key, pair: tuple[float, float], seconds: float, clock: str
) -> list[Row]:
    """One run, measured at times spaced evenly in their logarithm.

    Args:
        bench_task: the task, made for the run's seed.
        key: solver, seed and params.
        pair: (ρ, ρ/γ).
        seconds: the budget.
        clock: "wall" or "cpu".

    Returns:
        Its rows; the last one has a status. Once diverged, its values are NaN.

    Raises:
        ConfigError: the budget is over before the first step.
    """
    task, name = bench_task.task, CLOCKS[clock]
    solver = bench_solvers.build(key.solver, bench_task, *pair)
    init_rng, run_rng = jax.random.split(jax.random.PRNGKey(key.seed))
    start = task.init(init_rng)
    state = solver.init(
        start.inner_params, start.outer_params, model_state=start.model_state, rng=run_rng
    )
    loop = Loop(
        solver,
        task.inner,
        task.outer,
        seed=key.seed,
        capacity=_CHUNK_STEPS,
        target_seconds=min(0.1, seconds / 100),
    )
    try:
        return list(_rows(bench_task, key, solver, loop, state, seconds, name))
    finally:
        loop.close()


def _rows(
    bench_task: BenchTask,
    key: Key,
    solver: BilevelSolver,
    loop: Loop,
    state: Any,
    seconds: float,
    clock: str,
) -> Iterator[Row]:
    step, units = 0, 0.0

    def row(status: str = "") -> Row:
        nothing = (math.nan,) * 3
        found = nothing if status == DIVERGED else bench_task.measure(state)
        if not all(map(math.isfinite, found)):
            status, found = DIVERGED, nothing
        value, gap, validation = map(float, found)
        spent = (loop.seconds, loop.cpu_seconds, units)
        return Row(bench_task.name, *key, step, *spent, value, gap, validation, status)

    yield row()
    times = iter(np.geomspace(seconds * _FIRST_EVALUATION, seconds, _EVALUATIONS)[:-1])
    due = next(times)
    while getattr(loop, clock) < seconds:
        refresh_step = int(solver.next_refresh(state))
        if refresh_step <= step:
            state, spent = loop.refresh(state)
            units += spent
        else:
            state, info = loop.run(state, step, refresh_step)
            alive = all(bool(side[-1]) for side in info.finite)
            step += len(info.inner_loss) - (not alive)
            units += float(np.sum(info.oracle_units, dtype=np.float64))
            if not alive:
                yield row(DIVERGED)
                return
        if step and due <= getattr(loop, clock) < seconds:
            found = row()
            yield found
            if found.status:
                return
            while due <= getattr(loop, clock):
                due = next(times, math.inf)
    if step == 0 or (step == 1 and getattr(loop, clock) > seconds):
        raise ConfigError(
            f"--seconds={seconds:g}: {key.solver} took {getattr(loop, clock):.3g} s and did not "
            "finish its first step within the budget (full passes count); give more seconds"
        )
    yield row(FINISHED)


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
