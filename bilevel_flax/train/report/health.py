"""The health of a run in its report: what was warned about, what the last values mean, curves."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel_flax.train.health.thresholds import PREFIX, Watch
from bilevel_flax.train.metrics.units import unit_of
from bilevel_flax.train.report.plots import figure_of
from bilevel_flax.train.report.sections import Section, curve_grid, note_html

# Panels, and which values stand in each, with the names that a reader wants.
_PANELS = (
    ("Adjoint residual", {"adjoint_residual": "adjoint residual"}),
    (
        "Step lengths, relative to z, v and x",  # of runs of version 0.1
        {"health/step_inner": "z", "health/step_adjoint": "v", "health/step_outer": "x"},
    ),
    ("Negative curvature along v", {"health/negative_curvature": "share of minibatches"}),
    ("Size of x, relative to its start", {"health/outer_size": "size of x"}),
    (
        "Outer loss, seen and held out",
        {"health/loss_seen": "seen", "health/loss_held_out": "held out"},
    ),
    ("Hypergradient cosine", {"hypergradient_cosine": "hypergradient cosine"}),
)
# In words, not in a panel.
_NUMBERS = ("loss_gap_error", "reference_residual", "smallest_curvature", "largest_curvature")
# What a residual means, by its upper bound; v = 0 has 1.
_RESIDUALS = (
    (0.1, "v solves its system well"),
    (0.5, "v solves its system roughly"),
    (0.9, "v solves its system poorly: read the cosine before you trust x"),
    (
        1.5,
        "v is no better than v = 0, which is usual while a deep network trains: the validation "
        "metric says whether x is learned",
    ),
    (math.inf, "v is worse than v = 0, so x did not follow the hypergradient"),
)
_SOLVED = 0.1  # residual up to which the reference's own system counts as solved


def names() -> set[str]:
    """All values that the section shows or sums up: the report's other curves leave them out."""
    shown = {name for _, panel in _PANELS for name in panel}
    return shown | {f"health/{rest}" for rest in _NUMBERS}


def section(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None = None
) -> Section | None:
    """The section, or None for a run without measurements.

    Args:
        rows: lines of `metrics.jsonl`.
        summary: of a finished run: its residual is that over all of the data.
    """
    panels = []
    for title, labels in _PANELS:
        renamed = [
            {"step": row["step"], **{labels[name]: row[name] for name in labels if name in row}}
            for row in rows
        ]
        figure = figure_of(renamed, title, unit_of(next(iter(labels)), {}))
        if figure is not None and any(value for row in renamed for value in list(row.values())[1:]):
            panels.append((title, figure))
    ours = names()
    if not any(name.startswith(PREFIX) or name in ours for row in rows for name in row):
        return None
    return Section(
        "Health",
        in_words(rows, summary or {})
        + (curve_grid(panels) if panels else "")
        + note_html(
            "Measured on fixed minibatches; a residual below their noise is left out. "
            "docs/health.md says what is healthy."
        ),
    )


def in_words(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """Warnings, what the residual means, and the last check, as HTML.

    Args: as `section`.
    """
    return _verdict(rows) + _residual(rows, summary) + _last_check(rows)


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """The warnings, and what is out of range at the end; good news only where there is neither."""
    warned = [
        (row["step"], name.removeprefix(PREFIX), str(text))
        for row in rows
        for name, text in row.items()
        if name.startswith(PREFIX)
    ]
    lines = [f"<b>step {step:,}</b>: {html.escape(text)}" for step, _, text in warned]
    known = {name for _, name, _ in warned}
    lines += [
        f"<b>at the last probe</b>: {html.escape(text)}"
        for name, text in Watch(rows).out_of_range().items()
        if name not in known
    ]
    if lines:
        return '<ul class="warnings">' + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"
    if not _is_judged(rows):
        return (
            "<p>No warnings so far, which is no proof of health: "
            "the hypergradient itself has not been judged.</p>"
        )
    return "<p>No warnings: at its last probe every measurement lies in its healthy range.</p>"


def _newest(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[int, float] | None:
    for row in reversed(rows):
        if name in row and math.isfinite(float(row[name])):
            return row["step"], float(row[name])
    return None


def _is_judged(rows: Sequence[Mapping[str, Any]]) -> bool:
    cosine, reference = (
        _newest(rows, name) for name in ("hypergradient_cosine", "health/reference_residual")
    )
    return cosine is not None and reference is not None and reference[1] <= _SOLVED


def _residual(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    value, where = summary.get("adjoint_residual"), "at the end, over all of the data"
    if not isinstance(value, int | float) or not math.isfinite(value):
        probe = _newest(rows, "adjoint_residual")
        if probe is None:
            return ""
        value, where = probe[1], f"at step {probe[0]:,}"
    meaning = next(words for bound, words in _RESIDUALS if value <= bound)
    return (
        f"<p>Adjoint residual {where}: {value:.2g}. 0 is the exact adjoint, 1 is what v = 0 gives: "
        f"{meaning}.</p>"
    )


def _last_check(rows: Sequence[Mapping[str, Any]]) -> str:
    checks = [row for row in rows if "hypergradient_cosine" in row]
    if not checks:
        return ""
    last = checks[-1]
    text = (
        f"Hypergradient at step {last['step']:,}: cosine {float(last['hypergradient_cosine']):.4f}"
    )
    if "health/reference_residual" in last:
        residual = float(last["health/reference_residual"])
        text += f" with a reference whose own system is solved to {residual:.2g}"
        if residual > _SOLVED:
            text += ", which is not well: the cosine says little"
    if "health/smallest_curvature" in last and "health/largest_curvature" in last:
        low, high = (float(last[f"health/{n}_curvature"]) for n in ("smallest", "largest"))
        text += f"; curvature of the inner loss from {low:.3g} to {high:.3g}"
    return f"<p>{html.escape(text)}.</p>"
