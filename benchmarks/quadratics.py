"""Random quadratics with closed-form h: oracle units to a level, and how low constant steps lead.

    JAX_ENABLE_X64=1 python benchmarks/quadratics.py --pairs 63 --out runs/quadratics.csv

Two questions, both with constant steps for every method, plain SGD at every level, float64:

1. How many oracle units does a method need until ‖∇h‖² is below 1e-4? Each method is given the same
   pairs (ρ, ρ/γ) and the same units on seed 0; its four best pairs are then run four times as long
   with other seeds, and the best median counts: the first time below, and since when it stays.
2. How low does ‖∇h‖² get in a long run with the pair that ended lowest?
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import jax
import numpy as np

from benchmarks.rows import Rows, add_argument
from benchmarks.tasks import quadratics
from bilevel_flax.bench import methods, steps
from bilevel_flax.bench.options import grid
from bilevel_flax.bench.tasks import Context
from bilevel_flax.train.step_runner import StepRunner

LEVEL = 1e-4
CHUNK = 2000


class Quadratics:
    """The bench's task with methods whose steps do not decay."""

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        self.bench = quadratics.make("quadratics", Context(seed, None, folder, print))
        self.exact = quadratics.means(*quadratics.draw(0, **quadratics.SIZES))
        self.best = self.exact.value_and_grad(self.exact.minimiser())[0]
        constant = lambda setting: quadratics.optimizers(
            setting._replace(inner_decay=0.0, outer_decay=0.0)
        )
        self.bench = self.bench._replace(optimizers=constant)

    def measure(self, state) -> tuple[float, float]:
        """(‖∇h‖², h - h*)."""
        value, gradient = self.exact.value_and_grad(np.asarray(state.outer_params))
        return float(gradient @ gradient), value - self.best

    def run(self, name: str, pair: tuple[float, float], units: float, loop: StepRunner | None):
        """[(units, ‖∇h‖², h - h*)] at 150 counts of units, and the loop for the next pair."""
        build = lambda rho, ratio: methods.build(name, self.bench, rho, ratio)
        solver = steps.with_steps(build, *pair)
        task = self.bench.task
        start = task.init(jax.random.PRNGKey(0))
        state = solver.init(start.inner_params, start.outer_params, rng=jax.random.PRNGKey(1))
        loop = loop or StepRunner(solver, task.inner, task.outer, seed=self.seed, capacity=CHUNK)
        rows, step, spent = [(0.0, *self.measure(state))], 0, 0.0
        for due in np.geomspace(units / 1000, units, 150):
            while spent < due:
                refresh_step = int(solver.next_refresh(state))
                if refresh_step <= step:
                    state, cost = loop.refresh(state)
                    spent += cost
                    continue
                most = step + max(1, int((due - spent) / solver.units))
                state, info = loop.run(state, step, min(refresh_step, most))
                step += len(info.inner_loss)
                spent += float(np.sum(info.oracle_units, dtype=np.float64))
                if not all(bool(side[-1]) for side in info.finite):
                    return [*rows, (spent, math.inf, math.inf)], loop
            rows.append((spent, *self.measure(state)))
            if not 1e-24 < rows[-1][1] < 1e12:  # at the bottom, or on its way to infinity
                break
        return rows, loop


def first(rows, level: float = LEVEL) -> float:
    """Units when ‖∇h‖² was first seen below the level; infinite if it was not."""
    return next((row[0] for row in rows if row[1] < level), math.inf)


def since(rows, level: float = LEVEL) -> float:
    """Units since when ‖∇h‖² stays below the level; infinite if it does not."""
    reached = math.inf
    for row in rows:
        reached = math.inf if not row[1] < level else min(reached, row[0])
    return reached


def tail(rows) -> float:
    """Where ‖∇h‖² ends: the median of the last ten."""
    return float(np.median([row[1] for row in rows[-10:]]))


class Log:
    """Prints lines and appends rows to the CSV file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def __call__(self, kind: str, name: str, pair, rows) -> dict[str, float]:
        """One row of the file; returns what it says."""
        results = {"first": first(rows), "since": since(rows), "tail": tail(rows)}
        results |= {"lowest": min(row[1] for row in rows), "to 1e-20": since(rows, 1e-20)}
        self._writer.writerow([kind, name, *pair, *results.values()])
        self._file.flush()
        return results


def tune(name: str, studies: list[Quadratics], options, log: Log, table: Rows) -> None:
    """Question 1 for one method, then question 2."""
    loop, results = None, {}
    for pair in grid(options.pairs):
        rows, loop = studies[0].run(name, pair, options.units, loop)
        loop.rewind()
        results[pair] = log("grid", name, pair, rows)
    for key in ("first", "since"):
        best = sorted(results, key=lambda pair: results[pair][key])[: options.confirm]
        medians = {}
        for pair in best:
            runs = []
            for study in studies[1:]:
                rows, _ = study.run(name, pair, 4 * options.units, None)
                runs.append(log("confirm", name, pair, rows)[key])
            medians[pair] = float(np.median(runs))
        if medians:
            pair = min(medians, key=lambda pair: medians[pair])
            row = {"solver": name, "below": key, "units": _units(medians[pair])}
            table.add({**row, "ρ, ρ/γ": _shown(pair)}, f"Oracle units until ‖∇h‖² < {LEVEL:g}")
    if options.long_units:
        pair = min(results, key=lambda pair: results[pair]["tail"])
        rows, _ = studies[0].run(name, pair, options.long_units, None)
        end = log("long", name, pair, rows)
        row = {"solver": name, "ρ, ρ/γ": _shown(pair), "lowest ‖∇h‖²": f"{end['lowest']:.2g}"}
        row |= {"at the end": f"{end['tail']:.2g}", "1e-20 since": _units(end["to 1e-20"])}
        table.add(row, f"A long run: {options.long_units:g} units")


def _units(spent: float) -> str:
    return f"{spent:.3g}" if math.isfinite(spent) else "never"


def _shown(pair: tuple[float, float]) -> str:
    return ", ".join(f"{value:g}" for value in pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--solvers", default="saba,srba,spaba,soba,amigo")
    parser.add_argument("--pairs", type=int, default=63)
    parser.add_argument("--units", type=float, default=4e4, help="of a run of the grid")
    parser.add_argument("--seeds", type=int, default=3, help="of the second look; 0: none")
    parser.add_argument("--confirm", type=int, default=4, help="pairs that get the second look")
    parser.add_argument("--long-units", type=float, default=2e6, help="of the long run; 0: none")
    parser.add_argument("--out", type=Path, required=True, help="a CSV file, appended to")
    add_argument(parser)
    options = parser.parse_args()
    if not jax.config.read("jax_enable_x64"):
        raise SystemExit("float32 cannot show 1e-20: set JAX_ENABLE_X64=1")
    log = Log(options.out)
    studies = [Quadratics(options.out.parent, seed) for seed in range(options.seeds + 1)]
    with Rows(options.markdown) as table:
        for name in options.solvers.split(","):
            tune(name, studies, options, log, table)


if __name__ == "__main__":
    main()
