"""The curves of a run: what `metrics.jsonl` holds, drawn in a few panels that read together."""

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bilevel_flax import deprecated
from bilevel_flax.train.metrics.units import COUNT, FRACTION, unit_of

# Mid tones that read on white and on black.
# Four that nobody takes for one another, whatever their eyes (tests/train/report_test.py), and four
# more of that kind: these are drawn with dashes.
COLOURS = ("#3f87e5", "#e8833a", "#2fa36b", "#d36ba6", "#8f6fd6", "#e05252", "#8a94a3", "#c2a018")
DASHES = ("-", "--")

# The values that every run logs, and the panels that they share.
_LOSSES = ("inner_loss", "outer_loss")
_NORMS = ("norm_inner", "norm_adjoint", "norm_outer")
_NOT_DRAWN = ("step", "oracle_units")
_RAW_POINTS = 800
SMOOTHED_FROM = 60  # values of a metric
_ACRONYMS = re.compile(r"\b(auc|cifar|cnn|hvp|mlp|mnist|saba|soba|srba)\b")

PERCENT = FuncFormatter(lambda fraction, _: f"{100 * fraction:.4g} %")


def humanize(name: str) -> str:
    """A name as it is read.

    >>> humanize("inner_loss"), humanize("wrong_label_auc"), humanize("")
    ('inner loss', 'wrong label AUC', '(no name)')
    """
    words = re.sub(r"[_/.\s]+", " ", name).strip()
    return _ACRONYMS.sub(lambda match: match[0].upper(), words) or "(no name)"


def as_title(name: str) -> str:
    """A name with a capital first letter.

    >>> as_title("mnist_hypercleaning"), as_title("inner_loss")
    ('MNIST hypercleaning', 'Inner loss')
    """
    words = humanize(name)
    return words[:1].upper() + words[1:]


def new_figure(width: float = 5.4, height: float = 3.2) -> tuple[Figure, Axes]:
    """An empty panel in the report's style.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        The figure and its only axes.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#8a94a3", alpha=0.22, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    axes.set_prop_cycle(color=COLOURS)
    return figure, axes


def curve_figures(
    rows: Sequence[Mapping[str, Any]], units: Mapping[str, str] = types.MappingProxyType({})
) -> list[tuple[str, Figure]]:
    """Draws a run's metrics: losses, norms of the directions, then the task's own.

    Names with a common part before a slash (`mixture/english`, `mixture/code`) share a panel, every
    other metric has its own. Every measured value is drawn lightly, a centred moving average (of
    the logarithm where the axis is logarithmic) strongly. Values that are not finite are left out,
    and so are metrics that never change.

    Args:
        rows: Lines of `metrics.jsonl`, each with a `step`.
        units: By name, as `Task.units`.

    Returns:
        Pairs of title and figure; a group without values is left out.
    """
    series = _series(rows)
    figures = []
    for title, names in (("Losses", _LOSSES), ("Norms of the directions", _NORMS)):
        group = {name: series.pop(name) for name in names if name in series}
        if group:
            shared = {unit_of(name, units) for name in group}
            figures.append((title, _draw(group, title, shared.pop() if len(shared) == 1 else "")))
    for name in _NOT_DRAWN:
        series.pop(name, None)
    for family, members in _families(series):
        lines = {name[len(family) + 1 :]: series.pop(name) for name in members}
        title = as_title(family)
        figures.append((title, _draw(lines, title, unit_of(members[0], units))))
    for name, values in series.items():
        if np.ptp(values[1]) > 0:
            title = as_title(name)
            figures.append((title, _draw({name: values}, title, unit_of(name, units))))
    return figures


def _families(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The groups of two and more names that share what precedes the last slash."""
    families: dict[str, list[str]] = {}
    for name in names:
        if "/" in name:
            families.setdefault(name.rsplit("/", 1)[0], []).append(name)
    return [(family, members) for family, members in families.items() if len(members) > 1]


def figure_of(rows: Sequence[Mapping[str, Any]], title: str, unit: str = "") -> Figure | None:
    """All values of the rows in one panel; None where none has two finite values.

    Args:
        rows: Each with a `step`.
        title: A single value of this name gets no legend.
        unit: Of all values.
    """
    series = _series(rows)
    return _draw(series, title, unit) if series else None


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Steps and values by name, [2, number of finite values]."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or value is None:
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if np.isfinite(number):
                points.setdefault(name, []).append((float(row["step"]), number))
    return {name: np.array(pairs).T for name, pairs in points.items() if len(pairs) > 1}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average, shorter at both ends.

    Args:
        values: [n].
        window: Number of values averaged in the middle of the array, odd.

    Returns:
        [n].

    >>> smooth(np.array([0.0, 3.0, 0.0, 3.0]), 3)
    array([1.5, 1. , 2. , 1.5])
    """
    ones = np.ones(window)
    span = slice(window // 2, window // 2 + len(values))
    total = np.convolve(values, ones)[span]
    return total / np.convolve(np.ones_like(values), ones)[span]


def _draw(group: Mapping[str, np.ndarray], title: str, unit: str = "") -> Figure:
    figure, axes = new_figure()
    every = np.concatenate([values for _, values in group.values()])
    percent = unit == FRACTION
    logarithmic = not percent and bool(every.min() > 0) and bool(every.max() > 5 * every.min())

    for number, (name, (steps, values)) in enumerate(group.items()):
        colour = COLOURS[number % len(COLOURS)]
        style = DASHES[number // 4 % 2]
        window = 2 * (len(values) // SMOOTHED_FROM) + 1
        if window >= 3:
            thin = slice(None, None, -(-len(values) // _RAW_POINTS))
            axes.plot(steps[thin], values[thin], color=colour, alpha=0.25, linewidth=0.7)
            smoothed = smooth(np.log(values) if logarithmic else values, window)
            values = (np.exp(smoothed) if logarithmic else smoothed)[thin]
            steps = steps[thin]
        marker = "o" if len(values) <= 12 else ""
        axes.plot(
            steps,
            values,
            style,
            color=colour,
            linewidth=1.7,
            marker=marker,
            markersize=3.5,
            label=humanize(name),
        )
    if logarithmic:
        _decimal_log_axis(axes)
    if percent:
        axes.yaxis.set_major_formatter(PERCENT)
    elif unit and unit != COUNT:
        axes.set_ylabel(unit, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    if [as_title(name) for name in group] != [title]:
        legend = figure.legend(loc="outside upper left", ncols=3, frameon=False)
        for text in legend.get_texts():  # names are no TeX, whatever stands in them
            text.set_parse_math(False)
    return figure


def _decimal_log_axis(axes: Axes) -> None:
    """A logarithmic axis that reads 0.02, 0.1, 0.5 over few decades, powers of ten over many."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 1e4:
        subs = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


__getattr__ = deprecated.names(__name__)
