"""What a bench shows: a table on the terminal, and `bench.html` with curves and published results.

Runs of one method are summed up by their median and their 20 % and 80 % quantiles, over seeds.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bilevel_flax.bench import markdown
from bilevel_flax.bench.results import DIVERGED, Row, Runs, score, time_below
from bilevel_flax.bench.tasks import BenchTask
from bilevel_flax.train.metrics.units import FRACTION
from bilevel_flax.train.report import page as report
from bilevel_flax.train.report.plots import COLOURS, PERCENT, as_title, new_figure
from bilevel_flax.train.report.sections import figure_html, note_html

LEVELS = (1e-2, 1e-3, 1e-4, 1e-5)
_POINTS = 200
_FLOOR = 1e-16  # of a logarithmic axis; float64 resolves no smaller gap
_LABELS = {
    "seconds": "seconds",
    "cpu_seconds": "seconds of CPU time",
    "oracle_units": "oracle units",
}


def by_solver(runs: Runs) -> dict[str, list[list[Row]]]:
    """The runs of each method, in the order in which they were done."""
    groups: dict[str, list[list[Row]]] = {}
    for key, rows in runs.items():
        groups.setdefault(key.solver, []).append(rows)
    return groups


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20 %, 80 %); a NaN is a diverged run and counts as the worst.

    >>> quantiles([3.0, 1.0, 2.0])
    (2.0, 1.0, 3.0)
    """
    known = np.where(np.isnan(values), np.inf, values)
    low, middle, high = np.quantile(known, [0.2, 0.5, 0.8], method="nearest")
    return float(middle), float(low), float(high)


def _number(value: float, rate: bool = False) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f} %" if rate else f"{value:.3g}"


def table(bench_task: BenchTask, runs: Runs, clock: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a method a row, best final gap first."""
    rate = bench_task.unit == FRACTION
    header = ["solver", "ρ, ρ/γ", f"final {bench_task.quantity}", "20-80 %"]
    published = bench_task.published_finals
    header += ["published"] if published else []
    if not rate:
        header += [f"s to {level:.0e}".replace("e-0", "e-") for level in LEVELS]
        header += [f"units to {LEVELS[2]:.0e}".replace("e-0", "e-")]
    header += ["updates", "µs an update", "CPU µs", "units", "diverged"]
    lines = []
    for solver, group in by_solver(runs).items():
        last = [rows[-1] for rows in group]
        middle, low, high = quantiles([row.gap for row in last])
        cells = [solver, last[0].params, _number(middle, rate)]
        cells += [f"{_number(low, rate)} .. {_number(high, rate)}"]
        cells += [published.get(solver, "")] if published else []
        if not rate:
            for level in LEVELS:
                cells += [_number(quantiles([time_below(rows, level, clock) for rows in group])[0])]
            units = [time_below(rows, LEVELS[2], "oracle_units") for rows in group]
            cells += [_number(quantiles(units)[0])]
        steps = float(np.median([row.iteration for row in last]))
        cells += [f"{steps:,.0f}"]
        for name in ("seconds", "cpu_seconds"):
            paces = [getattr(row, name) / max(row.iteration, 1) for row in last]
            cells += [_number(1e6 * float(np.median(paces)))]
        cells += [_number(float(np.median([row.oracle_units for row in last])))]
        cells += [f"{sum(row.status == DIVERGED for row in last)} of {len(last)}"]
        lines.append((middle, cells))
    return header, [cells for _, cells in sorted(lines, key=lambda line: line[0])]


def shown(header: Sequence[str], rows: Sequence[Sequence[str]], as_markdown: bool) -> str:
    """A table for a terminal, or for a page."""
    if not as_markdown:
        return aligned(header, rows)
    return f"{markdown.caption()}\n\n{markdown.table(header, rows)}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, its columns one below the other."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write(
    out: Path,
    bench_task: BenchTask,
    chosen: Runs,
    every: Runs,
    seconds: float,
    clock: str,
    pairs: int,
) -> Path:
    """Writes `bench.html`.

    Args:
        out: the bench's folder.
        bench_task: what was run.
        chosen: the runs with each method's chosen steps.
        every: all runs of the folder, those of the grid included.
        seconds: the budget of a run.
        clock: "wall" or "cpu".
        pairs: how many pairs of steps each method chose from; 0: recorded ones.
    """
    name = {"wall": "seconds", "cpu": "cpu_seconds"}[clock]
    seeds = max(len(group) for group in by_solver(chosen).values())
    facts = (
        f"{seconds:g} s of {clock} time a run, compilation and evaluation apart · "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'} · "
        + (f"steps: the best of {pairs} pairs for each method" if pairs else "recorded steps")
    )
    sections = [report.table_section("Methods", *table(bench_task, chosen, name), _TABLE_NOTE)]
    grid = "".join(
        f"<div><h3>against {_LABELS[axis]}</h3>"
        f"{figure_html(curves(bench_task, chosen, axis), f'bench {axis}')}</div>"
        for axis in ("seconds", "cpu_seconds", "oracle_units")
    )
    note = note_html(
        "Line: median over seeds. Band: 20 to 80 %. A curve ends where runs diverged; one at 1e-16 "
        "is at the best value known."
    )
    sections.append(
        report.Section(f"Curves of {bench_task.quantity}", f'<div class="grid">{grid}</div>{note}')
    )
    if bench_task.published[1]:
        header, rows = bench_task.published
        sections.append(
            report.table_section("Published", list(header), rows, bench_task.published_note)
        )
    if pairs:
        sections.append(_grid_section(bench_task, every))
    body = (
        '<header><p class="kicker">bilevel_flax bench</p>'
        f"<h1>{html.escape(as_title(bench_task.name))}</h1>"
        f'<p class="lead">{html.escape(facts)}</p></header>'
    ) + "".join(
        f"<section><h2>{html.escape(section.title)}</h2>{section.html}</section>"
        for section in sections
    )
    path = out / "bench.html"
    return report.write_page(path, report.page(f"{bench_task.name} · bilevel_flax bench", body))


_TABLE_NOTE = (
    "Medians over seeds. 's to' and 'units to': when the gap fell below to stay below; '-': it "
    "did not. A unit is a gradient, Hessian-vector or cross product on a minibatch; full passes "
    "count."
)


def _grid_section(bench_task: BenchTask, runs: Runs) -> report.Section:
    rate = bench_task.unit == FRACTION
    rows = [
        [key.solver, key.params, _number(rows[-1].gap, rate), _number(score(rows)), rows[-1].status]
        for key, rows in sorted(runs.items(), key=lambda item: (item[0].solver, score(item[1])))
        if key.seed == 0
    ]
    header = ["solver", "ρ, ρ/γ", bench_task.quantity, "selected by", "end"]
    return report.table_section("Every pair of steps, seed 0", header, rows)


def band(group: list[list[Row]], axis: str) -> np.ndarray:
    """Median, 20 % and 80 % of a method's runs on a common axis.

    Args:
        group: runs, rows in order.
        axis: "seconds", "cpu_seconds" or "oracle_units".

    Returns:
        float64 [4, points]: where, median, 20 %, 80 %. Between two evaluations a run counts with
        the earlier one; where most runs have diverged the values are infinite.
    """
    where = [np.array([getattr(row, axis) for row in rows]) for rows in group]
    gaps = [np.array([row.gap for row in rows]) for rows in group]
    firsts = [places[places > 0][0] for places in where if (places > 0).any()]
    if not firsts:
        return np.empty((4, 0))
    end = max(places[-1] for places in where)
    points = np.geomspace(max(firsts), max(end, max(firsts) * 1.0001), _POINTS)
    values = [
        gap[np.searchsorted(places, points, side="right") - 1]
        for places, gap in zip(where, gaps, strict=True)
    ]
    summary = np.array([quantiles(column) for column in np.array(values).T]).T
    return np.concatenate([points[None], summary])


def curves(bench_task: BenchTask, runs: Runs, axis: str) -> Figure:
    """The gap of every method against time or oracle units."""
    rate = bench_task.unit == FRACTION
    figure, axes = new_figure(6.2, 4.0)
    empty = True
    for number, (solver, group) in enumerate(by_solver(runs).items()):
        colour = COLOURS[number % len(COLOURS)]
        style = ("-", "--", ":")[number // 4 % 3]
        where, middle, low, high = band(group, axis)
        finite = np.isfinite(middle)
        # A run that reached the best value there is has a gap of 0, which no logarithm shows.
        show = lambda values, finite=finite: np.where(
            finite & np.isfinite(values), np.maximum(values, -np.inf if rate else _FLOOR), np.nan
        )
        empty = empty and not finite.any()
        axes.plot(where, show(middle), style, color=colour, linewidth=1.7, label=solver)
        axes.fill_between(where, show(low), show(high), color=colour, alpha=0.18, linewidth=0)
    if empty:  # every run diverged, and a logarithmic axis needs a value
        axes.text(0.5, 0.5, "no finite value", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return figure
    axes.set_xscale("log")
    if rate:
        axes.yaxis.set_major_formatter(PERCENT)
    else:
        axes.set_yscale("log")
    axes.set_xlabel(_LABELS[axis])
    axes.set_ylabel(bench_task.quantity)
    figure.legend(loc="outside upper left", ncols=5, frameon=False)
    return figure
