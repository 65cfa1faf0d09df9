"""`report.html`: a run in one file, readable without a network, in light and in dark.

A number is shown with the unit that its task declared for it (`Task.units`); one without a unit is
shown as it is.

Example:
    >>> import pathlib, tempfile
    >>> workdir = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (workdir / "summary.json").write_text('{"solver": "soba", "test_error": 0.1501}')
    >>> _ = (workdir / "units.json").write_text('{"test_error": "fraction"}')
    >>> sizes = table_section("Sizes", ["split", "examples"], [["train", 3000]])
    >>> "15.01 %" in write_report(workdir, sections=[sizes]).read_text()
    True
"""

import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_flax.train.config import flatten
from bilevel_flax.train.metrics import read_metrics
from bilevel_flax.train.metrics.units import format_value, unit_of
from bilevel_flax.train.report import health as health_report
from bilevel_flax.train.report.plots import SMOOTHED_FROM, as_title, curve_figures, humanize
from bilevel_flax.train.report.sections import (
    Section,
    curve_grid,
    figure_section,
    gallery_section,
    note_html,
    table_section,
)
from bilevel_flax.train.workdir import replaced

__all__ = [
    "Section",
    "figure_section",
    "gallery_section",
    "page",
    "table_section",
    "write_page",
    "write_report",
]

# Cards of every run, after the task's own headline, and their labels.
_COST = {"steps": "steps", "seconds": "time of all steps"}
# Entries of the summary that are no number of the run.
_ELSEWHERE = ("headline", "conclusion")


def write_report(
    workdir: str | Path, *, sections: Sequence[Section] = (), path: str | Path | None = None
) -> Path:
    """Builds `report.html` from what a run left behind.

    Reads `summary.json` (its `headline` names the cards at the top, its `conclusion` is the
    sentence under them), `config.json` (the run's config), `units.json` (units by name) and
    `metrics.jsonl` (curves). Each may be missing, as in a run that is still going on: the report
    then says so.

    Args:
        workdir: The run's folder.
        sections: What the task adds, before the curves.
        path: The file to write; None: `report.html` in `workdir`.

    Returns:
        The path of the file, which needs no other file and no network.

    Raises:
        ValueError: If `workdir` is not a folder, or one of its files is damaged.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"workdir={str(workdir)!r} is not a folder: pass the folder of a run")
    summary, config = _read_object(workdir / "summary.json"), _read_object(workdir / "config.json")
    units = {name: str(unit) for name, unit in _read_object(workdir / "units.json").items()}
    metrics = workdir / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []

    body = [_header(workdir, summary, config, rows, units)]
    health = health_report.section(rows, summary)
    own = (_curves(rows, units), *([] if health is None else [health]))
    # What a run has found comes before how it ran.
    body += [_section(section) for section in (*sections, *own)]
    numbers = {name: value for name, value in summary.items() if name not in _ELSEWHERE}
    body += [
        _pairs(
            "All numbers",
            {
                humanize(name): format_value(value, unit_of(name, units))
                for name, value in flatten(numbers).items()
            },
            is_open=True,
        ),
        _pairs("Config", {name: format_value(value) for name, value in flatten(config).items()}),
    ]
    content = page(f"{_title(workdir, config)} · bilevel_flax", "\n".join(filter(None, body)))
    return write_page(workdir / "report.html" if path is None else Path(path), content)


def write_page(path: Path, content: str) -> Path:
    """Writes a page in one step."""
    with replaced(path) as file:
        file.write(content)
    return path


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it or run train again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def page(title: str, body: str) -> str:
    """A whole HTML file in the report's style.

    Args:
        title: Plain text.
        body: HTML, trusted as it is.
    """
    css = importlib.resources.files("bilevel_flax.train.report").joinpath("report.css").read_text()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _title(workdir: Path, config: Mapping[str, Any]) -> str:
    name = config.get("name") or config.get("task")
    return as_title(name) if isinstance(name, str) else workdir.resolve().name


def _header(
    workdir: Path,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    units: Mapping[str, str],
) -> str:
    solver = summary.get("solver", config.get("solver"))
    facts = [f"solver {solver}"] if isinstance(solver, str) else []
    facts += [f"seed {summary['seed']}"] if "seed" in summary else []
    if not summary:
        step = f" at step {rows[-1]['step']:,}" if rows else ""
        facts.append(f"not finished{step}: the same train command goes on with it")
    numbers = flatten(summary)
    chosen = summary.get("headline")
    chosen = [str(name) for name in chosen] if isinstance(chosen, list) else []
    names = [name for name in (*chosen, *_COST) if name in numbers]
    cards = "".join(
        f'<div class="card{"" if number else " first"}">'
        f"<b>{html.escape(format_value(numbers[name], unit_of(name, units)))}</b>"
        f"<span>{html.escape(_COST.get(name) or humanize(name))}</span></div>"
        for number, name in enumerate(names)
    )
    conclusion = summary.get("conclusion")
    return (
        f'<header><p class="kicker">bilevel_flax run report</p>'
        f"<h1>{html.escape(_title(workdir, config))}</h1>"
        f'<p class="lead">{html.escape(" · ".join([*facts, workdir.resolve().name]))}</p></header>'
        + (f'<div class="cards">{cards}</div>' if cards else "")
        + (f'<p class="conclusion">{html.escape(str(conclusion))}</p>' if conclusion else "")
    )


def _curves(rows: Sequence[Mapping[str, Any]], units: Mapping[str, str]) -> Section:
    elsewhere = health_report.names()
    shown = [
        {name: row[name] for name in row if name not in elsewhere and not name.startswith("_")}
        for row in rows
    ]
    figures = curve_figures(shown, units)
    if not figures:
        return Section(
            "Curves", note_html("metrics.jsonl holds fewer than two steps: nothing to draw")
        )
    smoothed = len(shown) >= SMOOTHED_FROM
    note = note_html("Light: as measured. Strong: centred moving average.") if smoothed else ""
    return Section("Curves", curve_grid(figures) + note)


def _section(section: Section) -> str:
    return f"<section><h2>{html.escape(section.title)}</h2>{section.html}</section>"


def _pairs(title: str, values: Mapping[str, str], *, is_open: bool = False) -> str:
    if not values:
        return ""
    lines = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in values.items()
    )
    return (
        f"<section><details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>"
        f'<dl class="pairs">{lines}</dl></details></section>'
    )
