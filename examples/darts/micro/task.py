"""A search in the micro-space as a task: the supernet's problem, and what the table says at last.

    bilevel-flax train --config configs/darts_micro.py --workdir runs/micro

The genotype is chosen by the learned mixture (or on the digits of F); the exhaustive table of test
accuracies is only looked at afterwards, for regret and rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bilevel_flax as bf
from bilevel_flax.checks import check_count
from bilevel_flax.train.config import ConfigError, check_choice, nearest
from bilevel_flax.train.metrics import read_metrics
from bilevel_flax.train.report.plots import COLOURS, PERCENT, new_figure
from bilevel_flax.train.report.sections import Section, figure_section, table_section
from bilevel_flax.train.task import InitialValues, Task
from bilevel_flax.train.workdir import read_json, write_json
from examples.darts import selection
from examples.darts.micro import methods as micro_methods
from examples.darts.micro import scores as micro_scores
from examples.darts.micro import table as micro_table
from examples.darts.micro.network import MicroNetwork
from examples.darts.micro.run import derive
from examples.darts.micro.search import CELL, make_search, mixture, one_hot
from examples.darts.micro.space import EDGES, OPERATIONS, check

SELECTIONS = ("strongest", "perturbation")
_PREFIX = "_share"  # for the files alone, see `Task.evaluate`


def space_of(config: Any) -> tuple[str, ...]:
    """The operations that `config.space` names.

    Raises:
        ConfigError: fewer than two, an unknown one, one twice.
    """
    names = tuple(config.space.operations)
    for name in names:
        if name not in OPERATIONS:
            raise ConfigError(
                f"--config.space.operations: unknown operation {name!r}, choose among "
                f"{', '.join(OPERATIONS)}{nearest(name, list(OPERATIONS))}"
            )
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"--config.space.operations={names}: give two or more, each once")
    return names


def make_task(config: Any) -> Task:
    """The task that `configs/darts_micro.py` describes.

    Args:
        config: keys `space.operations`, `channels`, `batch_size`, `selection`, `method`, `seed`.

    Raises:
        ConfigError: an unknown operation or selection, a batch or width that is none.
    """
    names = space_of(config)
    check_choice(f"--config.selection={config.selection}", config.selection, SELECTIONS)
    for key in ("channels", "batch_size"):
        check_count(f"--config.{key}", config[key])
    network = MicroNetwork(names=names, channels=config.channels)
    search = make_search(config.seed, network=network, batch_size=config.batch_size)
    weights_of = mixture(names).weights
    table = micro_table.read()
    judged = not np.isnan(table).any() and config.channels == MicroNetwork().channels

    def init(rng: jax.Array) -> InitialValues:
        return InitialValues(*search.init(rng))

    def shares(state: bf.TrainState) -> np.ndarray:
        return np.asarray(weights_of(state.outer_params)[CELL])

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        mixture = shares(state)
        return {
            "validation_error": 1 - search.accuracy(state.inner_params, mixture),
            "mixture_entropy": float(selection.entropy(mixture)),
        } | {
            f"{_PREFIX}/{start}-{end}/{name}": float(share)
            for (start, end), row in zip(EDGES, mixture, strict=True)
            for name, share in zip(names, row, strict=True)
        }

    def final_metrics(
        state: bf.TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        mixture, z = shares(state), state.inner_params
        if config.selection == "perturbation":
            accuracy = lambda weights: search.accuracy(z, weights)
            chosen = selection.select_by_perturbation(accuracy, mixture, names, ("none",))
            genotype = check(chosen, "the derived genotype")
        else:
            genotype = derive(mixture, names)
        write_json(workdir / "genotype.json", {"space": "micro", "operations": list(genotype)})
        results = {
            "genotype": list(genotype),
            "collapsed": micro_scores.collapsed(genotype),
            "validation_error": 1 - search.accuracy(z, mixture),
            "validation_error_one_network": 1 - search.accuracy(z, one_hot(genotype, names)),
            "units_over_plain_training": (
                config.steps * micro_methods.UNITS[config.method] / micro_methods.PLAIN_STEPS
            ),
        }
        log(f"genotype: {' '.join(genotype)}")
        if not judged:
            log("no regret: the table is not complete, or holds networks of another width")
            return results
        score = micro_scores.score(genotype, table)
        return results | {
            "test_accuracy": score.accuracy,
            "regret": score.regret,
            "rank_percentile": score.rank_percentile,
        }

    return Task(
        problem=search.problem,
        init=init,
        inner=search.inner,
        outer=search.outer,
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=("validation_error", *(("regret", "rank_percentile") if judged else ())),
        units=dict.fromkeys(
            (
                "validation_error",
                "validation_error_one_network",
                "test_accuracy",
                "regret",
                "rank_percentile",
            ),
            "fraction",
        ),
    )


def sections(workdir: Path) -> list[Section]:
    """The report's own part: the network found, its place in the table, the shares over time."""
    parts = []
    if (workdir / "genotype.json").exists():
        genotype = read_json(workdir / "genotype.json")["operations"]
        rows = [
            (f"{start} → {end}", name) for (start, end), name in zip(EDGES, genotype, strict=True)
        ]
        parts.append(
            table_section(
                "The network found",
                ("edge", "operation"),
                rows,
                "Node 0 is the stem's output, node 3 the cell's: three edges in a row, one around.",
            )
        )
    path = workdir / "metrics.jsonl"
    rows = [row for row in read_metrics(path)] if path.exists() else []
    rows = [row for row in rows if any(name.startswith(_PREFIX) for name in row)]
    if len(rows) > 1:
        names = [name for name in rows[0] if name.startswith(_PREFIX)]
        parts.append(
            figure_section("The operations' shares", _shares(rows, names), "softmax of the logits.")
        )
    return parts


def _shares(rows: list[dict[str, Any]], names: list[str]):
    figure, first = new_figure(9.6, 2.8)
    first.remove()
    steps = [row["step"] for row in rows]
    panels = list(dict.fromkeys(name.split("/")[1] for name in names))
    for place, edge in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        inside = [name for name in names if name.split("/")[1] == edge]
        for number, name in enumerate(inside):
            axes.plot(
                steps,
                [row[name] for row in rows],
                color=COLOURS[number % len(COLOURS)],
                label=name.split("/")[2] if place == 0 else None,
            )
        axes.set_title(f"edge {edge}", fontsize=10)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=5, frameon=False)
    return figure
