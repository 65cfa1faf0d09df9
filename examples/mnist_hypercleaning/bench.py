"""`bilevel-flax bench cleaning`: what people do about wrong labels, beside `recipes.clean`.

Every method gets the same data, network, optimiser and number of steps a training (`rivals.py`);
how many trainings it takes is a column. No method sees a test image, and none sees which labels are
wrong. `results.csv` has a row for each method, setting and seed; the same command goes on.
"""

from __future__ import annotations

import csv
import html
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from bilevel_flax.bench import folder
from bilevel_flax.bench.markdown import caption, table
from bilevel_flax.bench.options import Options
from bilevel_flax.bench.report import aligned
from bilevel_flax.train.config import ConfigError, check_choice
from bilevel_flax.train.report import page as report
from bilevel_flax.train.report.plots import COLOURS, new_figure
from bilevel_flax.train.report.sections import Section, figure_section, table_section
from examples.datasets import sources
from examples.mnist_hypercleaning import rivals, tables
from examples.mnist_hypercleaning.model import MODELS
from examples.mnist_hypercleaning.ranking import wrong_label_auc
from examples.mnist_hypercleaning.tables import Row
from examples.mnist_hypercleaning.task import load_examples

_DEFAULTS = {
    "clean": "500,100",
    "noise": "symmetric,class,instance",
    "model": "cnn",
    "data": "mnist5k",
    "steps": "1000",
}
_BATCH = 64
_TEST_SHARE, _MOST_TRAIN, _MOST_TEST = 0.2, 20_000, 10_000


def run(options: Options, say: Callable[[str], None] = print) -> list[Row]:
    """Runs what is missing in `options.out`, then writes the tables and `bench.html`.

    Args:
        options: `solvers` (None: all of `rivals.METHODS`), `seeds` (None: 1), `manual_dir`, `out`,
            and `choices`: clean, noise, model, data, steps.
        say: prints a line.

    Returns:
        The rows asked for.

    Raises:
        ConfigError: an unknown method, noise or network, sizes that the data do not have, another
            bench's folder.
    """
    options, methods = options.with_solvers(tuple(rivals.METHODS))
    choices = _checked(options, methods)
    with folder.lock(options.out):
        folder.claim(options.out, {"task": options.task, "steps": choices["steps"]})
        return _run_missing(options, methods, choices, say)


def _checked(options: Options, methods: Sequence[str]) -> dict[str, Any]:
    for name, given in (
        ("--seconds", options.seconds is not None),
        ("--grid", options.grid != 0),
        ("--clock", options.clock != "wall"),
    ):
        if given:
            raise ConfigError(f"{name}: cleaning compares at equal steps; leave it out")
    for method in methods:
        check_choice("--solvers", method, rivals.METHODS)
    chosen = {**_DEFAULTS, **options.choices}
    names: dict[str, Any] = {
        key: [part for part in chosen[key].split(",") if part]
        for key in ("noise", "model", "data", "clean")
    }
    for name in names["model"]:
        check_choice(f"--model={name}", name, MODELS)
    for noise in names["noise"]:
        check_choice(f"--noise={noise}", noise.partition(":")[0], tables.NOISE)
        try:
            fine = 0 < tables.kind_and_rate(noise)[1] < 1
        except ValueError:
            fine = False
        if not fine:
            raise ConfigError(f"--noise={noise}: a rate is a number between 0 and 1")
    sizes = {"clean": names["clean"], "steps": [chosen["steps"]]}
    for key, values in sizes.items():
        for value in values:
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"--{key}={value}: give whole numbers of 1 or more")
    names["clean"] = [int(value) for value in names["clean"]]
    empty = [key for key, values in names.items() if not values]
    if empty:
        raise ConfigError(f"--{empty[0]} is empty: name some, or leave it out")
    return {**names, "steps": int(chosen["steps"])}


def _run_missing(
    options: Options, methods: Sequence[str], choices: dict[str, Any], say: Callable[[str], None]
) -> list[Row]:
    path = options.out / "results.csv"
    done: dict[tuple[Any, ...], Row] = {
        (*row.setting, row.method, row.seed): row for row in read(path)
    }
    lists: list[Any] = [choices[key] for key in ("data", "model", "noise", "clean")]
    settings: list[tuple[Any, ...]] = list(itertools.product(*lists, range(options.seeds or 1)))
    asked = []
    for number, (data, model, noise, clean, seed) in enumerate(settings, 1):
        keys = [(data, model, noise, clean, method, seed) for method in methods]
        if missing := [key for key in keys if key not in done]:
            say(f"[{number}/{len(settings)}] {data}, {model}, {noise}, {clean} clean, seed {seed}")
            examples = _examples(options, data, noise, clean, seed)
            bout = rivals.Bout(examples, model, choices["steps"], _BATCH, seed)
            for key in missing:
                done[key] = _row(key, bout)
                folder.write_csv(path, Row._fields, map(_as_text, done.values()))
                row = done[key]
                say(f"    {row.method}: {row.test_error:.2%}, AUC {row.wrong_label_auc:.4f}")
        asked += [done[key] for key in keys]
    _write_page(options.out, asked)
    if options.markdown:
        say(f"\n{caption()}")
        for title, header, lines in tables.by_noise(asked):
            say(f"\n{title}:\n\n{table(header, lines)}")
    else:
        for setting, lines in tables.by_setting(asked):
            say(f"\n{tables.in_words(setting)}\n{aligned(tables.HEADER, lines)}")
    say(f"\n{path}, {options.out / 'bench.html'}")
    return asked


def _examples(options: Options, data: str, noise: str, clean: int, seed: int) -> Any:
    there = sources.available(data, manual_dir=options.manual_dir)
    test = min(_MOST_TEST, there.get("test", int(_TEST_SHARE * there["train"])))
    left = there["train"] - clean - (0 if "test" in there else test)
    if left < 1:
        raise ConfigError(
            f"--clean={clean}: {data} has {left + clean} training examples: leave some with given "
            "labels"
        )
    splits = (min(_MOST_TRAIN, left), clean, test)
    kind, rate = tables.kind_and_rate(noise)
    config = ml_collections.ConfigDict(
        {
            "data": {
                "name": data,
                "manual_dir": options.manual_dir,
                "data_dir": None,
                "splits": splits,
            },
            "noise": kind,
            "corruption": rate,
            "seed": seed,
        }
    )
    return load_examples(config)


def _row(key: tuple, bout: rivals.Bout) -> Row:
    outcome, seconds = rivals.timed(key[4], bout)
    ex = bout.examples
    return Row(
        *key,
        test_error=float(np.mean(outcome.predict(ex.test_images).argmax(1) != ex.test_labels)),
        wrong_label_auc=wrong_label_auc(-outcome.doubt, ex.is_wrong),
        average_precision=average_precision(outcome.doubt, ex.is_wrong),
        corrected_label_accuracy=float(np.mean(outcome.probabilities.argmax(1) == ex.true_labels)),
        cost=outcome.cost,
        seconds=seconds,
    )


def average_precision(doubt: np.ndarray, is_wrong: np.ndarray) -> float:
    """Mean, over the wrong labels, of the precision down to each; NaN where none is wrong.

    Args:
        doubt: float [n], high: likely wrong.
        is_wrong: bool [n].
    """
    if not is_wrong.any():
        return float("nan")
    in_order = is_wrong[np.argsort(-doubt, kind="stable")]
    precision = np.cumsum(in_order) / np.arange(1, len(in_order) + 1)
    return float(precision[in_order].mean())


def read(path: Path) -> list[Row]:
    """The rows of a `results.csv`; none where there is no file.

    Raises:
        ConfigError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        kinds: dict[str, Callable[[str], Any]] = dict.fromkeys(Row._fields, float)
        kinds |= dict.fromkeys(("data", "model", "noise", "method"), str)
        kinds |= dict.fromkeys(("clean", "seed"), int)
        return [Row(*(kind(line[name]) for name, kind in kinds.items())) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): use another --out") from error


def _as_text(row: Row) -> list:
    return [f"{value:.6g}" if isinstance(value, float) else value for value in row]


def _write_page(out: Path, rows: Sequence[Row]) -> Path:
    sections: list[Section] = []
    for setting, lines in tables.by_setting(rows):
        sections.append(table_section(tables.in_words(setting), list(tables.HEADER), lines, _NOTE))
        here = [row for row in rows if row.setting == setting]
        title = f"Error against cost: {tables.in_words(setting)}"
        sections.append(figure_section(title, _figure(here), "A mark a method and seed."))
    body = (
        '<header><p class="kicker">bilevel_flax bench</p><h1>Cleaning</h1>'
        '<p class="lead">What people do about wrong labels, at equal steps a training.</p></header>'
    ) + "".join(
        f"<section><h2>{html.escape(section.title)}</h2>{section.html}</section>"
        for section in sections
    )
    return report.write_page(out / "bench.html", report.page("cleaning · bilevel_flax bench", body))


_NOTE = (
    "Test error of the network that one would hand over. AUC, average precision: of ranking the "
    "wrong labels first. Labels right: the training labels as the method would correct them. "
    "Trainings: the cost, in plain trainings of this length."
)


def _figure(rows: Sequence[Row]) -> Figure:
    figure, axes = new_figure(7.2, 3.6)
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        group = [row for row in rows if row.method == method]
        axes.scatter(
            [row.cost for row in group],
            [100 * row.test_error for row in group],
            color=COLOURS[number % len(COLOURS)],
            marker=("o", "s", "^", "D", "v", "P", "X")[number % 7],
            s=36,
            label=method,
        )
    axes.set_xlabel("plain trainings")
    axes.set_ylabel("test error, %")
    axes.set_ylim(0, None)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
