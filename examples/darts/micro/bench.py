"""`bilevel-flax bench darts_micro`: search methods, judged by the exhaustive table.

Every method gets the same oracle units, so that the cheap ones take more steps. A run's genotype
is chosen by the search alone; the table's test accuracies say afterwards what it is worth.
`genotypes.csv` holds what each search found and `results.csv` what that is worth, one row a run;
the same command goes on where it was.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bilevel_flax.bench import folder
from bilevel_flax.bench.options import Options
from bilevel_flax.bench.report import shown
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.report import page as report
from bilevel_flax.train.report.plots import COLOURS, new_figure
from bilevel_flax.train.report.sections import Section, figure_section, table_section
from examples.darts.micro import methods, scores
from examples.darts.micro import table as micro_table
from examples.darts.micro.run import Searcher
from examples.darts.micro.search import make_search
from examples.darts.micro.space import check as check_genotype

SEEDS = 10
SOLVERS = ("soba", "darts1", "darts2")


class Row(NamedTuple):
    """A run; regret and rank_percentile are fractions with 0 the best."""

    solver: str
    seed: int
    regret: float
    rank_percentile: float
    collapsed: bool
    oracle_units: float
    seconds: float


COLUMNS = Row._fields


class Searched(NamedTuple):
    """What a run found: its genotype's operations in the order of the edges."""

    solver: str
    seed: int
    genotype: str
    oracle_units: float
    seconds: float


def scored(one: Searched, table: np.ndarray) -> Row:
    """What it is worth, by the table."""
    score = scores.score(tuple(one.genotype.split()), table)
    return Row(one.solver, one.seed, *score[1:], one.oracle_units, one.seconds)


def run(options: Options, say: Callable[[str], None] = print) -> list[Row]:
    """Runs what is missing in `options.out`, then writes the table and `bench.html`.

    Args:
        options: `solvers` (None: soba, darts1, darts2), `seeds` (None: 10) and `out`.
        say: prints a line.

    Returns:
        The rows asked for.

    Raises:
        ConfigError: an option that has no meaning here, an unknown method, another bench's folder.
        ValueError: the table of the micro-space is not complete.
    """
    options, solvers = options.with_solvers(SOLVERS)
    check(options, solvers)
    with folder.lock(options.out):
        return _run_missing(options, solvers, say)


def _run_missing(
    options: Options, solvers: tuple[str, ...], say: Callable[[str], None]
) -> list[Row]:
    seeds = SEEDS if options.seeds is None else options.seeds
    path = options.out / "genotypes.csv"
    done = {(one.solver, one.seed): one for one in read_searches(path)}
    settings = {"task": options.task, "units": methods.BUDGET}
    folder.claim(options.out, settings)
    wanted = [(solver, seed) for solver in solvers for seed in range(seeds)]
    searchers = {solver: Searcher(solver) for solver in solvers}
    for count, (solver, seed) in enumerate(wanted, 1):
        if (solver, seed) in done:
            continue
        say(f"[{count}/{len(wanted)}] {solver}, seed {seed}")
        outcome = searchers[solver](make_search(seed), seed)
        done[solver, seed] = Searched(
            solver, seed, " ".join(outcome.genotype), outcome.oracle_units, outcome.seconds
        )
        folder.write_csv(path, Searched._fields, _as_text(done.values()))
        say(f"    {done[solver, seed].genotype} after {outcome.seconds:.0f} s")

    # Only now: no search has seen a test accuracy.
    table = micro_table.read()
    rows = {key: scored(one, table) for key, one in done.items()}
    folder.write_csv(options.out / "results.csv", COLUMNS, _as_text(rows.values()))
    asked = [rows[key] for key in wanted]
    write_report(options.out, asked, table)
    say(shown(HEADER, summary(asked), options.markdown))
    say(f"{options.out / 'results.csv'}, {options.out / 'bench.html'}")
    return asked


def check(options: Options, solvers: tuple[str, ...]) -> None:
    """Raises on options that this bench has no use for.

    Raises:
        ConfigError: names the option and the fix.
    """
    if not solvers:
        raise ConfigError(f"--solvers is empty: choose some of {', '.join(methods.METHODS)}")
    for name in solvers:
        methods.check_method(name, "--solvers")
        if solvers.count(name) > 1:
            raise ConfigError(f"--solvers names {name} twice: give each once")
    for name, given in (
        ("--seconds", options.seconds is not None),
        ("--grid", options.grid != 0),
        ("--clock", options.clock != "wall"),
        ("--manual-dir", options.manual_dir is not None),
    ):
        if given:
            raise ConfigError(
                f"{name}: darts_micro compares methods at {methods.BUDGET} oracle units, on "
                "bundled digits; leave it out"
            )


def read_searches(path: Path) -> list[Searched]:
    """The rows of a `genotypes.csv`; none where there is no file.

    Raises:
        ConfigError: it is damaged.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    try:
        if tuple(header) != Searched._fields:
            raise ValueError(f"it has the columns {', '.join(header)}")
        return [_parsed(*line) for line in lines]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): use another --out") from error


def _as_text(rows: Iterable[Sequence]) -> Iterator[list]:
    for row in rows:
        yield [f"{value:.6g}" if isinstance(value, float) else value for value in row]


def _parsed(solver: str, seed: str, genotype: str, units: str, seconds: str) -> Searched:
    names = check_genotype(genotype.split(), genotype)
    return Searched(solver, int(seed), " ".join(names), float(units), float(seconds))


HEADER = (
    "solver",
    "median regret",
    "worst",
    "median rank",
    "worst",
    "collapsed",
    "units",
    "seconds",
)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method, in the order of the runs; percent signs are points of accuracy."""
    lines = []
    for solver in dict.fromkeys(row.solver for row in rows):
        group = [row for row in rows if row.solver == solver]
        regrets = [row.regret for row in group]
        ranks = [row.rank_percentile for row in group]
        lines.append(
            [
                solver,
                *(f"{100 * of(values):.2f} %" for values in (regrets, ranks) for of in _OF),
                f"{sum(row.collapsed for row in group)} of {len(group)}",
                f"{np.median([row.oracle_units for row in group]):,.0f}",
                f"{np.median([row.seconds for row in group]):.0f}",
            ]
        )
    return lines


_OF = (np.median, np.max)


def write_report(out: Path, rows: Sequence[Row], table: np.ndarray) -> Path:
    """Writes `bench.html`."""
    ceiling = scores.rank_ceiling(table)
    best = 100 * table.mean(1).max()
    sections = [
        table_section("Methods", list(HEADER), summary(rows), _NOTE),
        figure_section("Every run among the 625 networks", _figure(rows, table), _FIGURE_NOTE),
    ]
    facts = (
        f"{methods.BUDGET} oracle units a search · best network of the table {best:.2f} % · "
        f"Spearman correlation between its seeds {ceiling:.3f}"
    )
    body = (
        '<header><p class="kicker">bilevel_flax bench</p><h1>DARTS micro-space</h1>'
        f'<p class="lead">{html.escape(facts)}</p></header>'
    ) + "".join(map(_html, sections))
    path = out / "bench.html"
    return report.write_page(path, report.page("darts_micro · bilevel_flax bench", body))


def _html(section: Section) -> str:
    return f"<section><h2>{html.escape(section.title)}</h2>{section.html}</section>"


_NOTE = (
    "Regret: the best mean test accuracy of the 625 minus that of the network found. Rank: the "
    "share of the 625 that are better. Collapsed: at most one of the four edges carries a "
    "convolution that has an effect. A unit is a gradient, Hessian-vector or cross product on a "
    "minibatch. Seconds: a run, without compilation."
)
_FIGURE_NOTE = (
    "Grey: all 625 networks by their rank, mean test accuracy of three trainings. Marks: the "
    "networks that the searches ended with, a seed each."
)


def _figure(rows: Sequence[Row], table: np.ndarray) -> Figure:
    figure, axes = new_figure(7.2, 3.6)
    means = np.sort(table.mean(1))[::-1]
    axes.plot(100 * np.arange(len(means)) / (len(means) - 1), 100 * means, color="#8a94a3")
    for number, solver in enumerate(dict.fromkeys(row.solver for row in rows)):
        group = [row for row in rows if row.solver == solver]
        axes.scatter(
            [100 * row.rank_percentile for row in group],
            [100 * (means[0] - row.regret) for row in group],
            color=COLOURS[number % len(COLOURS)],
            marker=("o", "s", "^", "D", "v", "P")[number % 6],
            s=34,
            alpha=0.6,
            label=solver,
            zorder=3,
        )
    axes.set_xlabel("rank, % of the networks that are better")
    axes.set_ylabel("test accuracy, %")
    figure.legend(loc="outside upper left", ncols=6, frameon=False)
    return figure
