"""What the augmentation task adds to a run's report: the policy, its way there, and its effect.

Everything is drawn from `summary.json`, `metrics.jsonl` and `samples.npz` in the run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_flax.train.metrics import read_metrics
from bilevel_flax.train.report.page import Section, figure_section, gallery_section, table_section
from bilevel_flax.train.report.plots import COLOURS, PERCENT, new_figure
from bilevel_flax.train.report.sections import compare_in_words
from bilevel_flax.train.workdir import read_json

_LABELS = {
    "none": "no augmentation",
    "random": "random policy of equal strength",
    "uniform": "uniform, as RandAugment",
    "search": "learned, network of the search",
    "learned": "learned, retrained with it frozen",
}
_PLAIN = ("none", "random", "uniform")
_PAIRS = 8  # pictures before and after
_NAMED = 6  # lines of the plot with a name


def sections(workdir: str | Path) -> list[Section]:
    """The sections of a run's report that are about its policy.

    Args:
        workdir: the run's folder.

    Returns:
        Test errors by policy, the learned policy, its strengths over time and examples before and
        after. What an unfinished run has not written is left out.
    """
    workdir = Path(workdir)
    parts: list[Section] = []
    summary = {}
    if (workdir / "summary.json").exists():
        summary = read_json(workdir / "summary.json")
        parts += [*_errors(summary), _table(summary)]
    if (workdir / "metrics.jsonl").exists():
        parts += _over_time(read_metrics(workdir / "metrics.jsonl"))
    if (workdir / "samples.npz").exists():
        with np.load(workdir / "samples.npz", allow_pickle=False) as file:
            parts.append(_samples(dict(file), summary.get("class_names")))
    return parts


def conclusion(summary: Mapping[str, Any]) -> str:
    """One sentence: what the learned policy is worth beside none, or a policy without learning."""
    errors = summary["test_error"]
    others = {_LABELS[name]: errors[name] for name in _PLAIN}
    ours = ("the network retrained with the learned policy", errors["learned"])
    return compare_in_words("test error", ours, others, "fraction")


def _errors(summary: Mapping[str, Any]) -> list[Section]:
    errors = summary.get("test_error", {})
    bars = [(label, errors[name], name) for name, label in _LABELS.items() if name in errors]
    if len(bars) < 2:
        return []
    labels, values, names = zip(*bars, strict=True)
    figure, axes = new_figure(7.2, 0.55 * len(bars) + 0.9)
    colours = [COLOURS[0] if name in ("learned", "search") else "#8a94a3" for name in names]
    drawn = axes.barh(range(len(bars)), values, color=colours, height=0.62)
    axes.bar_label(drawn, labels=[f"{100 * value:.2f} %" for value in values], padding=5)
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(values) or 1)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(False, axis="y")
    axes.set_xlabel("test error")
    caption = (
        "The same start, minibatches, optimiser and number of steps for all. The random policy has "
        "the learned strengths, dealt out to other operations; the uniform one's magnitude was "
        "chosen on validation data."
    )
    return [figure_section("Test error by policy", figure, caption)]


def _table(summary: Mapping[str, Any]) -> Section:
    classes = summary.get("class_names")
    header = ["operation", *(["class"] if classes else []), "magnitude", "limit", "unit"]
    header += ["probability", "strength", "planted"]
    rows = []
    for name, learned in summary["learned"].items():
        planted = summary["planted"].get(name, {}).get("magnitude", 0.0)
        magnitudes, chances = (np.atleast_1d(learned[k]) for k in ("magnitude", "probability"))
        truths = np.broadcast_to(np.atleast_1d(planted), magnitudes.shape)
        limit = summary["limits"][name]
        for number, (size, chance) in enumerate(zip(magnitudes, chances, strict=True)):
            label = [classes[number]] if classes else []
            strength = float(chance * size / limit)
            row = [name, *label, float(size), limit, summary["units"][name], float(chance)]
            rows.append([*row, strength, float(truths[number]) if summary["planted"] else "-"])
    rows.sort(key=lambda row: -row[-2])
    caption = (
        "Amounts are drawn uniformly up to the magnitude, in both directions where that makes "
        "sense. Strength: probability times magnitude as a fraction of its limit."
    )
    return table_section("Learned policy", header, rows, caption)


def _over_time(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    rows = [row for row in rows if any(name.startswith("_probability/") for name in row)]
    if len(rows) < 2:
        return []
    steps = [row["step"] for row in rows]
    names = [name.split("/", 1)[1] for name in rows[-1] if name.startswith("_probability/")]
    strengths = {
        name: [row[f"_probability/{name}"] * row.get(f"_magnitude/{name}", 1.0) for row in rows]
        for name in names
    }
    order = sorted(names, key=lambda name: -strengths[name][-1])
    figure, axes = new_figure(7.2, 4.0)
    for number, name in enumerate(order):
        named = number < _NAMED
        axes.plot(
            steps,
            strengths[name],
            color=COLOURS[number] if named else "#8a94a3",
            linewidth=1.8 if named else 0.9,
            label=name.replace("_", " ") if named else "others" if number == _NAMED else None,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("strength")
    axes.set_ylim(0, None)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    caption = "Probability times magnitude as a fraction of its limit, of each operation."
    return [figure_section("The policy over time", figure, caption)]


def _samples(samples: Mapping[str, np.ndarray], classes: list[str] | None) -> Section:
    before, after = samples["before"], samples["after"]
    title = "Training examples before and after"
    if before.ndim == 3:
        return _signals(before, after, samples["labels"], classes, title)
    count = min(_PAIRS, len(before))
    pairs = np.stack([before[:count], after[:count]], 1).reshape(-1, *before.shape[1:])
    pictures = np.round(255 * pairs.clip(0, 1)).astype(np.uint8)
    larger = max(1, 56 // pictures.shape[1])
    pictures = pictures.repeat(larger, axis=1).repeat(larger, axis=2)
    captions = ["before", "after"] * count
    return gallery_section(
        title, pictures, captions, "The first training images, and one draw of the learned policy."
    )


def _signals(before, after, labels, classes: list[str] | None, title: str) -> Section:
    figure, axes = new_figure(7.2, 5.0)
    count = min(_PAIRS, len(before))
    for number in range(count):
        base = -4.0 * number
        axes.plot(base + before[number, :, 0], color="#8a94a3", linewidth=0.9)
        axes.plot(base + after[number, :, 0], color=COLOURS[0], linewidth=1.2)
    names = [str(labels[n]) if classes is None else classes[labels[n]] for n in range(count)]
    axes.set_yticks([-4.0 * number for number in range(count)], names)
    axes.set_xlabel("sample")
    axes.grid(False, axis="y")
    caption = "Grey: the first channel of the first training signals. Blue: one draw of the policy."
    return figure_section(title, figure, caption)
