"""Does a tracked adjoint prevent DARTS's collapse? Searches where first-order DARTS collapses.

    python benchmarks/collapse.py --out DIR [--solvers soba,auto] [--seeds 20] [--decay 1e-3]

The space (`examples/darts/collapse`) has 64 networks, all of them trained. Every search has the
same gradient units; a network is taken from it in four ways. The same command goes on where it
was stopped; one core, six minutes.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.rows import Rows, add_argument
from bilevel_flax.bench import folder
from bilevel_flax.checks import check_count
from bilevel_flax.train.config import check_choice
from examples.darts.collapse import search, space
from examples.darts.collapse import table as tables


class Row(NamedTuple):
    """A network found."""

    solver: str
    selection: str
    seed: int
    genotype: str
    units: float
    cpu_seconds: float


def read(path: Path) -> list[Row]:
    """What an earlier run found."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(a, b, int(c), d, float(e), float(f))
            for a, b, c, d, e, f in list(csv.reader(file))[1:]
        ]


def searched(solver: str, seeds: list[int], decay: float) -> Iterator[list[Row]]:
    """The rows of one seed after the other."""
    searcher = search.Searcher(solver, decay=decay)
    for seed in seeds:
        sides, began = search.halves(seed), time.process_time()
        records = searcher(sides, seed)
        seconds = time.process_time() - began
        yield [
            Row(solver, one.selection, seed, " ".join(one.genotype), one.units, seconds)
            for one in search.select(solver, records, sides, decay)
        ]


def summary(rows: list[Row], accuracies: np.ndarray) -> dict[str, str]:
    """A method's line: what its networks are worth."""
    names = [" ".join(genotype) for genotype in space.genotypes()]
    found = [names.index(row.genotype) for row in rows]
    regrets = 100 * (accuracies.max() - accuracies[found])
    collapsed = sum(space.collapsed(space.genotypes()[number]) for number in found)
    skips = [space.genotypes()[number].count(space.SKIP) for number in found]
    return {
        "solver": rows[0].solver,
        "selection": rows[0].selection,
        "collapsed": f"{collapsed} of {len(rows)}",
        "median regret": f"{np.median(regrets):.2f}",
        "mean": f"{regrets.mean():.2f}",
        "worst": f"{regrets.max():.2f}",
        "skips of 6": f"{np.mean(skips):.1f}",
        "units": f"{np.mean([row.units for row in rows]):.0f}",
        "CPU s": f"{np.median([row.cpu_seconds for row in rows]):.1f}",
    }


def main() -> None:
    """Searches what is missing, then prints a row for each method and selection."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--solvers", default=",".join(search.UNITS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--decay", type=float, default=space.WEIGHT_DECAY, help="of z, in searches")
    add_argument(parser)
    args = parser.parse_args()
    solvers = args.solvers.split(",")
    check_count("--seeds", args.seeds)
    for solver in solvers:
        check_choice(f"--solvers={solver}", solver, tuple(search.UNITS))
    args.out.mkdir(parents=True, exist_ok=True)
    folder.claim(args.out, {"decay": args.decay})
    path = args.out / "genotypes.csv"
    rows = read(path)
    for solver in solvers:
        done = {row.seed for row in rows if row.solver == solver}
        missing = [seed for seed in range(args.seeds) if seed not in done]
        for new in searched(solver, missing, args.decay):
            rows += new
            folder.write_csv(path, Row._fields, rows)
    accuracies = tables.read().mean(1)  # only now: no search has seen a test digit
    every = [
        Row("a network drawn", "uniformly", 0, " ".join(genotype), 0.0, 0.0)
        for genotype in space.genotypes()
    ]
    with Rows(args.markdown) as table:
        table.add(summary(every, accuracies))
        for solver in solvers:
            for way in search.SELECTIONS:
                chosen = [
                    row
                    for row in rows
                    if (row.solver, row.selection) == (solver, way) and row.seed < args.seeds
                ]
                if chosen:
                    table.add(summary(chosen, accuracies))


if __name__ == "__main__":
    main()
