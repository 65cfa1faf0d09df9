"""What data mixing adds to a run's report; drawn from `summary.json`, `baselines.json`, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_flax.train.metrics import read_metrics
from bilevel_flax.train.report.plots import COLOURS, new_figure
from bilevel_flax.train.report.sections import (
    Section,
    compare_in_words,
    figure_section,
    table_section,
)
from bilevel_flax.train.workdir import read_json

LABELS = {
    "soba": "learned mixture",
    "uniform": "uniform mixture",
    "direct_mix": "sample mixed in",
    "classifier": "classifier",
    "dds": "gradient alignment",
    "retrained": "retrained on the learned mixture",
    "reference": "curriculum alone, nothing learned",
    "proportional": "proportional to size",
    "direct_mix_tuned": "sample mixed in, share tuned",
    "doremi": "DoReMi",
    "online": "online data mixing",
    "regmix": "RegMix",
}
_GREY = "#8a94a3"


def sections(workdir: str | Path) -> list[Section]:
    """The sections about the mixture; what an unfinished run has not written is left out.

    Args:
        workdir: the run's folder.
    """
    workdir = Path(workdir)
    metrics = workdir / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    summary = _read(workdir / "summary.json")
    parts = []
    if summary.get("mixture"):
        parts.append(_mixture(summary))
    results = _read(workdir / "baselines.json")
    if summary and len(results) > 1:
        parts += [_bars(summary, results), _curves(rows, results), _table(summary, results)]
    return parts


def conclusion(results: Mapping[str, Any]) -> str:
    """One sentence: what the learned mixture is worth, after fine-tuning, beside the others.

    Args:
        results: `nats_per_byte` of all methods, before and after.
    """
    after = {LABELS[name]: pair["after"] for name, pair in results["nats_per_byte"].items()}
    ours = after.pop(LABELS["soba"])
    quantity = "test loss (nats per byte, after fine-tuning)"
    return compare_in_words(quantity, (LABELS["soba"], ours), after)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _mixture(summary: Mapping[str, Any]) -> Section:
    ordered = sorted(summary["mixture"].items(), key=lambda item: -item[1])
    rows = [(name, f"{100 * share:.1f} %") for name, share in ordered]
    caption = (
        f"What was learned for the target, {summary.get('target', '')}. All domains start alike; "
        "the panel of the metrics shows how the shares went."
    )
    return table_section("Learned mixture", ("domain", "share of the training text"), rows, caption)


def _bars(summary: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    names = [name for name in LABELS if name in results]
    figure, axes = new_figure(7.2, 0.62 * len(names) + 0.9)
    for shift, when, alpha in ((-0.19, "before", 1.0), (0.19, "after", 0.45)):
        values = [results[name][when] for name in names]
        places = [place + shift for place in range(len(names))]
        colours = [COLOURS[0] if name in ("soba", "retrained") else _GREY for name in names]
        drawn = axes.barh(places, values, 0.36, color=colours, alpha=alpha)
        axes.bar_label(drawn, [f"{value:.3f} {when}" for value in values], padding=4, fontsize=8)
    low = min(min(results[name]["before"], results[name]["after"]) for name in names)
    high = max(max(results[name]["before"], results[name]["after"]) for name in names)
    axes.set_xlim(max(0.0, low - 0.6 * (high - low) - 0.02), high + 0.35 * (high - low) + 0.02)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("nats per byte on held-out text (the axis does not start at 0)")
    target = summary.get("target", "the target")
    best = min(names, key=lambda name: results[name]["before"])
    tuned = min(names, key=lambda name: results[name]["after"])
    caption = (
        f"Test text of {target} that chose nothing, {summary['tokens']:,} bytes of training for "
        f"each. Lowest before fine-tuning on the sample: {LABELS[best]}; after it: "
        f"{LABELS[tuned]}. The fine-tuning stops where the validation text says."
    )
    return figure_section("Nats per byte, before and after fine-tuning", figure, caption)


def _curves(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Section:
    own = [
        (row["step"], row["validation_nats_per_byte"])
        for row in rows
        if "validation_nats_per_byte" in row
    ]
    figure, axes = new_figure(7.2, 3.4)
    _draw(
        axes,
        {"soba": own}
        | {name: value["curve"][1:] for name, value in results.items() if value["curve"]},
    )
    axes.set(xlabel="step", ylabel="validation nats per byte")
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure_section(
        "Validation text while training", figure, "Held-out text of the target, before fine-tuning."
    )


def _draw(axes: Any, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    for number, (name, points) in enumerate(curves.items()):
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[number % len(COLOURS)],
                linewidth=2.2 if name == "soba" else 1.4,
                label=LABELS.get(name, name),
            )


def _table(summary: Mapping[str, Any], results: Mapping[str, Any]) -> Section:
    header = ("method", "validation", "validation, tuned", "test", "test, tuned", "plain steps")
    keys = ("validation_before", "validation_after", "before", "after")
    rows = [
        (
            LABELS[name],
            *(round(results[name][key], 4) for key in keys),
            # A run of before this was counted has none.
            f"{results[name].get('plain_step_equivalents', float('nan')):.0f}",
        )
        for name in LABELS
        if name in results
    ]
    caption = (
        "Nats per byte. All methods read the same stream of candidates and as many bytes of it, "
        f"{summary['tokens']:,}; learned mixture and gradient alignment pay for their gradients "
        "of the mixture on top. The last column counts all searches, in steps of plain training."
    )
    return table_section("All methods", header, rows, caption)
