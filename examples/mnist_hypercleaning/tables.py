"""The rows of `bench cleaning`, and the tables that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Probability of a wrong label, by kind; "symmetric:0.1" says another.
NOISE = {"symmetric": 0.5, "class": 0.4, "instance": 0.4}
HEADER = ("method", "test error", "AUC", "precision", "labels right", "trainings", "seconds")


class Row(NamedTuple):
    """A method in a setting; errors, accuracy and areas are fractions.

    `cost` is in plain trainings of the same number of steps, starts that methods share included.
    """

    data: str
    model: str
    noise: str
    clean: int
    method: str
    seed: int
    test_error: float
    wrong_label_auc: float
    average_precision: float
    corrected_label_accuracy: float
    cost: float
    seconds: float

    @property
    def setting(self) -> tuple[str, str, str, int]:
        """What all methods have in common."""
        return (self.data, self.model, self.noise, self.clean)


def kind_and_rate(noise: str) -> tuple[str, float]:
    """Of a kind of noise as the command line has it, "class" or "class:0.1".

    Raises:
        ValueError: the rate is no number.
    """
    kind, _, rate = noise.partition(":")
    return kind, float(rate) if rate else NOISE[kind]


def by_setting(rows: Sequence[Row]) -> list[tuple[tuple, list[list[str]]]]:
    """For each setting its methods, the lowest test error first; means and spread over seeds."""
    tables = []
    for setting in dict.fromkeys(row.setting for row in rows):
        methods = _by_method([row for row in rows if row.setting == setting])
        tables.append((setting, [_line(method, group) for method, group in methods]))
    return tables


def by_noise(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """For a results' page: a table a data set and size, with a column for each kind of noise.

    Returns:
        For each table its title, its header, and its lines, the lowest mean test error first.
    """
    tables = []
    for data, model, clean in dict.fromkeys((row.data, row.model, row.clean) for row in rows):
        here = [row for row in rows if (row.data, row.model, row.clean) == (data, model, clean)]
        noises = list(dict.fromkeys(row.noise for row in here))
        seeds = len({row.seed for row in here})
        title = f"{data}, {model}, {clean:,} clean, {seeds} seed{'s' * (seeds > 1)}"
        header = ["error, AUC, labels right", *map(_noise_in_words, noises)]
        lines = []
        for method, group in _by_method(here):
            cells = [_cell([row for row in group if row.noise == noise]) for noise in noises]
            lines.append([method, *cells, _mean(group, "cost", ".2f"), _mean(group, "seconds")])
        tables.append((title, [*header, "trainings", "seconds"], lines))
    return tables


def in_words(setting: tuple) -> str:
    """The title of a setting."""
    data, model, noise, clean = setting
    return f"{data}, {model}, {_noise_in_words(noise)}, {clean:,} clean"


def _noise_in_words(noise: str) -> str:
    kind, rate = kind_and_rate(noise)
    return f"{kind} {rate:g}"


def _by_method(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Methods and their rows, the lowest mean test error first."""
    names = dict.fromkeys(row.method for row in rows)
    groups = [(name, [row for row in rows if row.method == name]) for name in names]
    return sorted(groups, key=lambda pair: np.mean([row.test_error for row in pair[1]]))


def _line(method: str, group: Sequence[Row]) -> list[str]:
    areas = [_mean(group, name, ".4f") for name in ("wrong_label_auc", "average_precision")]
    right = _mean(group, "corrected_label_accuracy", ".2%")
    costs = [_mean(group, "cost", ".2f"), _mean(group, "seconds")]
    return [method, _error(group), *areas, right, *costs]


def _cell(group: Sequence[Row]) -> str:
    if not group:
        return ""
    area = _mean(group, "wrong_label_auc", ".4f")
    right = _mean(group, "corrected_label_accuracy", ".1%").replace("%", " %")
    return f"{_error(group)}, {area}, {right}"


def _error(group: Sequence[Row]) -> str:
    errors = 100 * np.array([row.test_error for row in group])
    spread = f" ± {errors.std(ddof=1):.2f}" if len(group) > 1 else ""
    return f"{errors.mean():.2f}{spread} %"


def _mean(group: Sequence[Row], name: str, form: str = ".0f") -> str:
    return format(float(np.mean([getattr(row, name) for row in group])), form)
