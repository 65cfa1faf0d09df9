"""The health of a run in its report: what was warned about, and the curves behind it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel_flax.train.health.thresholds import PREFIX
from bilevel_flax.train.report import plots as curves
from bilevel_flax.train.report.sections import Section, curve_grid, note_html

# Panels, and which values stand in each, with the names that a reader wants.
_PANELS = (
    ("Adjoint residual", {"adjoint_residual": "adjoint residual"}),
    (
        "Step lengths, relative to z, v and x",
        {"health/step_inner": "z", "health/step_adjoint": "v", "health/step_outer": "x"},
    ),
    ("Negative curvature along v", {"health/negative_curvature": "fraction of minibatches"}),
    ("Size of x, relative to its start", {"health/outer_size": "size of x"}),
    (
        "Outer loss, seen and held out",
        {"health/loss_seen": "seen", "health/loss_held_out": "held out"},
    ),
    ("Hypergradient cosine", {"hypergradient_cosine": "hypergradient cosine"}),
)
# In words, not in a panel.
_NUMBERS = ("loss_gap_error", "reference_residual", "smallest_curvature", "largest_curvature")


def names() -> set[str]:
    """All values that the section shows or sums up: the report's other curves leave them out."""
    shown = {name for _, panel in _PANELS for name in panel}
    return shown | {f"health/{rest}" for rest in _NUMBERS}


def section(rows: Sequence[Mapping[str, Any]]) -> Section | None:
    """The section, or None for a run without measurements.

    Args:
        rows: lines of `metrics.jsonl`.
    """
    panels = []
    for title, wanted in _PANELS:
        renamed = [
            {"step": row["step"], **{wanted[name]: row[name] for name in wanted if name in row}}
            for row in rows
        ]
        figure = curves.figure_of(renamed, title)
        if figure is not None and any(value for row in renamed for value in list(row.values())[1:]):
            panels.append((title, figure))
    said = _said(rows)
    measured = any(name in row for row in rows for name in names())
    if not measured and not said:
        return None
    grid = curve_grid(panels) if panels else ""
    return Section(
        "Health",
        _verdict(said)
        + _last_check(rows)
        + grid
        + note_html("Measured on fixed minibatches; docs/health.md says what is healthy."),
    )


def _said(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    return [
        (row["step"], str(text))
        for row in rows
        for name, text in row.items()
        if name.startswith(PREFIX)
    ]


def _verdict(said: Sequence[tuple[int, str]]) -> str:
    if not said:
        return "<p>No warnings: every measurement stayed in its healthy range.</p>"
    lines = "".join(f"<li><b>step {step:,}</b>: {html.escape(text)}</li>" for step, text in said)
    return f'<ul class="warnings">{lines}</ul>'


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
        if residual > 0.1:
            text += ", which is not well: the cosine says little"
    if "health/smallest_curvature" in last and "health/largest_curvature" in last:
        low, high = (float(last[f"health/{n}_curvature"]) for n in ("smallest", "largest"))
        text += f"; curvature of the inner loss from {low:.3g} to {high:.3g}"
    return f"<p>{html.escape(text)}.</p>"
