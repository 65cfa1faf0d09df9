"""What hypercleaning adds to a run's report: did the learned weights find the wrong labels?

Everything is drawn from `summary.json` and `learned.npz` in the run's folder:

    weights            float32 [n]        learned weights, in [0, 1]
    wrong_probability  float32 [n]        that the given label is wrong; optional
    suggested_label    int [n]            the likeliest label; optional
    is_wrong           bool [n]           whether the given label differs from the true one
    given_label        int [n]            what the training saw
    true_label         int [n]            what it should have seen
    suspicious_index   int [k]            whom to look at first
    suspicious_images  uint8 [k, h, w(, c)]
    class_names        str [classes]      optional
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bilevel_flax.train.report.page import (
    Section,
    figure_section,
    gallery_section,
)
from bilevel_flax.train.report.plots import COLOURS, PERCENT, new_figure
from bilevel_flax.train.report.sections import compare_in_words, table_section
from bilevel_flax.train.workdir import read_json, replaced
from examples.mnist_hypercleaning import ranking

_CLEAN, _WRONG = COLOURS[0], COLOURS[1]

_ERRORS = (
    ("test_error_handover", "hand-over: recipes.clean"),
    ("test_error_no_weights", "no weights"),
    ("test_error_validation_only", "validation data only"),
    ("test_error_rounds", "rounds by hand: filter, relabel, train"),
    ("test_error", "learned weights"),
    ("test_error_retrained", "retrained with the learned weights"),
    ("test_error_refit", "refit: that and the validation data"),
    ("test_error_clean", "true labels"),
)
# What one could have without any learned weight.
_PLAIN = (
    ("test_error_validation_only", "the clean validation data alone"),
    ("test_error_no_weights", "all labels as they are"),
    ("test_error_rounds", "rounds of filtering and relabelling by hand"),
)
_LEARNED = ("test_error_handover", "test_error", "test_error_retrained", "test_error_refit")
_REQUIRED = (
    "weights",
    "is_wrong",
    "given_label",
    "true_label",
    "suspicious_index",
    "suspicious_images",
)


def sections(workdir: str | Path) -> list[Section]:
    """The sections of a run's report that are about cleaning.

    Args:
        workdir: The run's folder.

    Returns:
        Test errors against the baselines, the learned weights by clean and wrong, the ROC curve
        and the most suspicious examples. What an unfinished run has not written is left out.

    Raises:
        ValueError: If `learned.npz` lacks an array or holds one that does not fit.
    """
    workdir = Path(workdir)
    parts = []
    if (workdir / "summary.json").exists():
        parts += _errors(read_json(workdir / "summary.json"))
    if (workdir / "learned.npz").exists():
        learned = load_learned(workdir / "learned.npz")
        parts += [_weights(learned), *_roc(learned), *_precision(learned), _gallery(learned)]
    return parts


def load_learned(path: str | Path) -> dict[str, np.ndarray]:
    """Reads `learned.npz` without ever executing code from it.

    Args:
        path: The file.

    Returns:
        The arrays named above.

    Raises:
        ValueError: If an array is missing or does not fit the others.
    """
    with np.load(path, allow_pickle=False) as file:
        learned = dict(file)
    missing = [name for name in _REQUIRED if name not in learned]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: run train again")
    n, k = len(learned["weights"]), len(learned["suspicious_index"])
    for name, length in dict.fromkeys(_REQUIRED[1:4], n).items():
        if learned[name].shape != (length,):
            raise ValueError(f"{path}: {name} has shape {learned[name].shape}, not ({length},)")
    if len(learned["suspicious_images"]) != k:
        raise ValueError(f"{path}: {len(learned['suspicious_images'])} suspicious images for {k}")
    return learned


def write_suspicious_csv(
    path: str | Path,
    weights: np.ndarray,
    given_label: np.ndarray,
    *,
    wrong_probability: np.ndarray | None = None,
    suggested_label: np.ndarray | None = None,
    limit: int | None = None,
) -> Path:
    """Writes the training examples in the order in which a person should look at them.

    The columns are `index` (position in the training set), `given_label`, `weight`, `rank`, and
    `wrong_probability` and `suggested_label` where they are given. Rank 1 is the likeliest wrong,
    or without probabilities the lowest weight; equals stand in order of index.

    Args:
        path: The file to write.
        weights: [n], in [0, 1].
        given_label: [n] int.
        wrong_probability: [n], in [0, 1].
        suggested_label: [n] int.
        limit: Number of lines; None writes every example.

    Returns:
        The path.

    Raises:
        ValueError: If the lengths differ or what ranks the examples is not a number.
    """
    optional = {"wrong_probability": wrong_probability, "suggested_label": suggested_label}
    columns = {
        "given_label": np.asarray(given_label),
        "weight": np.asarray(weights),
        **{name: np.asarray(column) for name, column in optional.items() if column is not None},
    }
    if len({column.shape for column in columns.values()}) != 1 or columns["weight"].ndim != 1:
        shapes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
        raise ValueError(f"{shapes} must both be [n]")
    trust = columns["weight"] if wrong_probability is None else -columns["wrong_probability"]
    if np.isnan(trust).any():
        raise ValueError(f"{np.isnan(trust).sum()} NaN: there is no order in them")
    path = Path(path)
    given, weight, *others = columns.values()
    with replaced(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "given_label", "weight", "rank", *list(columns)[2:]])
        order = np.argsort(trust, kind="stable")[:limit]
        for rank, index in enumerate(order.tolist(), start=1):
            rest = [str(column[index]) for column in others]
            writer.writerow([index, int(given[index]), str(weight[index]), rank, *rest])
    return path


def conclusion(summary: Mapping[str, Any]) -> str:
    """One sentence: which network to hand over, and what it is worth beside plain training.

    Args:
        summary: with the errors of the baselines, in [0, 1].
    """
    ours = ("the network trained on all data with the learned weights (refit)", "test_error_refit")
    if "test_error_handover" in summary:
        ours = ("the network of recipes.clean (hand-over)", "test_error_handover")
    others = {label: summary[key] for key, label in _PLAIN if key in summary}
    return compare_in_words("test error", (ours[0], summary[ours[1]]), others, "fraction")


def _errors(summary: Mapping[str, Any]) -> list[Section]:
    bars = [
        (label, summary[key], key)
        for key, label in _ERRORS
        if isinstance(summary.get(key), int | float)
    ]
    if len(bars) < 2:
        return []
    labels, errors, keys = zip(*bars, strict=True)
    figure, axes = new_figure(7.2, 0.55 * len(bars) + 0.9)
    colours = [_CLEAN if key in _LEARNED else "#8a94a3" for key in keys]
    drawn = axes.barh(range(len(bars)), errors, color=colours, height=0.62)
    axes.bar_label(drawn, labels=[f"{100 * error:.2f} %" for error in errors], padding=5)
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(errors) or 1)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("test error")
    caption = "Blue: what this run has learned or made. "
    caption += "Same training budget for all, each stopped early on the validation data"
    caption += ", but for refit." if "test_error_refit" in keys else "."
    if "test_error_refit" in keys and "conclusion" not in summary:  # a run of version 0.1
        caption = f"{conclusion(summary)} {caption}"
    if "test_error_clean" in keys:
        caption += " True labels are what perfect cleaning would give, trained as the run is."
    if "test_error_handover" in keys:
        caption += (
            " The hand-over network is trained otherwise: with AdamW, less regularization and the "
            f"validation data, for {summary['plain_step_equivalents']:.2f} budgets. bilevel-flax "
            "bench cleaning compares it with others that are trained as it is."
        )
    return [figure_section("Test error against the baselines", figure, caption)]


def _weights(learned: Mapping[str, np.ndarray]) -> Section:
    weights, wrong = learned["weights"], learned["is_wrong"].astype(bool)
    figure, axes = new_figure(7.2, 3.4)
    bins = np.linspace(0.0, 1.0, 51).tolist()
    for part, colour, name in ((~wrong, _CLEAN, "correct label"), (wrong, _WRONG, "wrong label")):
        if part.any():
            axes.hist(weights[part], bins, histtype="stepfilled", alpha=0.4, color=colour)
            label = f"{name} ({part.sum():,})"
            axes.hist(
                weights[part], bins, histtype="step", linewidth=1.5, color=colour, label=label
            )
    axes.set_xlim(0, 1)
    axes.set_xlabel("learned weight")
    axes.set_ylabel("training examples")
    if np.mean((weights < 0.02) | (weights > 0.98)) > 0.8:
        # Nearly all weights have gone to 0 or 1: the few between would be flat on the axis.
        axes.set_yscale("log")
        axes.set_ylim(0.7, None)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    caption = (
        "The weight of every training example, learned from the validation loss alone: which "
        "labels are wrong was never shown to the solver."
    )
    return figure_section("Learned weights", figure, caption)


def _roc(learned: Mapping[str, np.ndarray]) -> list[Section]:
    wrong = learned["is_wrong"].astype(bool)
    if wrong.all() or not wrong.any():
        return []
    trust = _trust(learned)
    false_alarms, detections = ranking.roc_curve(trust, wrong)
    area = ranking.wrong_label_auc(trust, wrong)
    figure = _roc_figure(false_alarms, detections, area)
    caption = (
        f"Examples are called suspicious from the {_order(learned)} on; the area under the curve "
        f"is {area:.4f} (1: every wrong label comes before every correct one). The learned "
        f"weights alone reach {ranking.wrong_label_auc(learned['weights'], wrong):.4f}."
    )
    return [figure_section("Finding the wrong labels", figure, caption)]


def _trust(learned: Mapping[str, np.ndarray]) -> np.ndarray:
    """What ranks the examples: low is suspicious. A run of version 0.1 has weights only."""
    if "wrong_probability" in learned:
        return -learned["wrong_probability"]
    return learned["weights"]


def _order(learned: Mapping[str, np.ndarray]) -> str:
    return "likeliest wrong" if "wrong_probability" in learned else "lowest weight"


def _precision(learned: Mapping[str, np.ndarray]) -> list[Section]:
    """How many of the first k that one looks at are really wrong."""
    wrong = learned["is_wrong"].astype(bool)
    if not wrong.any():
        return []
    in_order = wrong[np.argsort(_trust(learned), kind="stable")]
    marks = [k for k in (10, 30, 100, 300, 1000, 3000, 10_000, 30_000) if k <= len(wrong)]
    rows = [
        [f"{k:,}", f"{in_order[:k].mean():.1%}", f"{in_order[:k].sum() / wrong.sum():.1%}"]
        for k in marks
    ]
    heads = ["looked at", "really wrong", "of all wrong labels"]
    caption = f"From the {_order(learned)} on; {wrong.sum():,} labels are wrong in all."
    return [table_section("Precision of the first examples", heads, rows, caption)]


def _roc_figure(false_alarms: np.ndarray, detections: np.ndarray, area: float) -> Figure:
    figure, axes = new_figure(4.6, 4.2)
    axes.plot([0, 1], [0, 1], "--", color="#8a94a3", linewidth=1)
    # A curve over 20,000 examples has thousands of corners; the eye needs a few hundred.
    keep = np.unique(np.linspace(0, len(detections) - 1, 400).astype(int))
    axes.plot(false_alarms[keep], detections[keep], color=_CLEAN, linewidth=2)
    axes.fill_between(false_alarms[keep], detections[keep], color=_CLEAN, alpha=0.12, linewidth=0)
    axes.text(0.62, 0.3, f"AUC {area:.3f}", fontsize=13, ha="center")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    axes.set_xlabel("correct labels called suspicious")
    axes.set_ylabel("wrong labels found")
    return figure


def _gallery(learned: Mapping[str, np.ndarray]) -> Section:
    index = learned["suspicious_index"]
    names = learned.get("class_names")

    def name(label: int) -> str:
        return str(label) if names is None else str(names[label])

    wrong = learned["is_wrong"].astype(bool)[index]
    captions = [
        f"given {name(given)}\nsuggested {name(suggested)}\n"
        + (f"is {name(true)}" if given != true else "given is right")
        for given, suggested, true in zip(
            learned["given_label"][index].tolist(),
            learned.get("suggested_label", learned["true_label"])[index].tolist(),
            learned["true_label"][index].tolist(),
            strict=True,
        )
    ]
    caption = (
        f"The first {len(index)} training examples from the {_order(learned)} on; "
        f"{wrong.sum()} of them really have a wrong label (framed red). All examples in this "
        "order are in suspicious.csv."
    )
    return gallery_section(
        "Most suspicious examples", learned["suspicious_images"], captions, caption, wrong.tolist()
    )
