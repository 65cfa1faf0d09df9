"""What a search adds to a run's report: the cells it found, and how it came to them.

Drawn from `genotype.json`, `metrics.jsonl`, and `retrained/retrained.json` in the run's folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bilevel_flax.train.report.page import Section, figure_section, table_section
from bilevel_flax.train.report.plots import COLOURS, PERCENT, new_figure
from bilevel_flax.train.workdir import read_json
from examples.darts import draw, genotype
from examples.darts.shares import read_shares

_COLUMNS = 5  # panels side by side


def sections(workdir: str | Path) -> list[Section]:
    """The cells, the test errors after retraining, shares and logits over the steps.

    What an unfinished run has not written is left out.

    Args:
        workdir: the run's folder.
    """
    workdir, parts = Path(workdir), []
    if (workdir / "genotype.json").exists():
        for name, cell in zip(
            genotype.CELLS, genotype.load(workdir / "genotype.json"), strict=True
        ):
            parts.append(Section(f"The {name} cell", draw.cell_svg(cell, f"{name} cell")))
    retrained = workdir / "retrained" / "retrained.json"
    if retrained.exists():
        parts.append(_errors(retrained))
    steps, shares = read_shares(workdir)
    if len(steps) > 1:
        for name, values in shares.items():
            parts += [_mean_shares(name, steps, values), _logits(name, steps, values)]
    if steps:
        parts += [_table(name, values[-1]) for name, values in shares.items()]
    return parts


def _errors(path: Path) -> Section:
    results = read_json(path)
    rows = [(run["seed"], 100 * run["test_error"]) for run in results["runs"]]
    return table_section(
        "Trained from scratch",
        ("seed", "test error, %"),
        rows,
        f"Mean {100 * results['test_error']:.2f} %, standard deviation "
        f"{100 * results['test_error_spread']:.2f}; {results['parameters']:,} parameters.",
    )


def _mean_shares(name: str, steps: list[int], values: np.ndarray) -> Section:
    figure, axes = new_figure(7.2, 3.2)
    axes.stackplot(
        steps, values.mean(1).T, labels=_labels(), colors=_colours(), linewidth=0, alpha=0.85
    )
    axes.set(xlabel="step", ylabel="share", xlim=(steps[0], steps[-1]), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure_section(
        f"Operations' shares, {name} cell", figure, "The mean over the cell's 14 edges."
    )


def _logits(name: str, steps: list[int], values: np.ndarray) -> Section:
    # A softmax does not see a constant, so the logits around their mean are all there is to see.
    logits = np.log(np.maximum(values, 1e-12))
    logits -= logits.mean(-1, keepdims=True)
    rows = -(-len(genotype.EDGES) // _COLUMNS)
    figure = Figure(figsize=(9.6, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (start, end), edge in zip(grid, genotype.EDGES, logits.swapaxes(0, 1), strict=False):
        for operation, line, colour in zip(genotype.OPERATIONS, edge.T, _colours(), strict=True):
            axes.plot(steps, line, color=colour, linewidth=1.1, label=operation)
        axes.set_title(f"{start} to {end}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#8a94a3", alpha=0.22, linewidth=0.6)
    for axes in grid[len(genotype.EDGES) :]:
        axes.set_axis_off()
    handles, _ = grid[0].get_legend_handles_labels()
    figure.legend(handles, _labels(), loc="lower right", fontsize=8, frameon=False, ncols=1)
    return figure_section(
        f"Logits of the {name} cell", figure, "One panel for each edge; logits around their mean."
    )


def _table(name: str, shares: np.ndarray) -> Section:
    rows = [
        (f"{start} to {end}", *(round(float(100 * share), 1) for share in row))
        for (start, end), row in zip(genotype.EDGES, shares, strict=True)
    ]
    return table_section(f"Shares of the {name} cell at the end, %", ("edge", *_labels()), rows)


def _labels() -> list[str]:
    return [name.replace("_", " ") for name in genotype.OPERATIONS]


def _colours() -> tuple[str, ...]:
    return COLOURS[: len(genotype.OPERATIONS)]
