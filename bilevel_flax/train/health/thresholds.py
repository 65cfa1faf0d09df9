"""Where the measurements of `monitor.py` are healthy, and what to try where they are not.

Warnings follow from the lines of `metrics.jsonl` alone: a resumed run gives those that an
uninterrupted one gives.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

PREFIX = "warning/"  # of their names in metrics.jsonl and TensorBoard
_ENOUGH = 2  # probes out of range, one after the other; one alone may be noise

Values = Mapping[str, float]


class Range(NamedTuple):
    """A measurement, when it is out of range, and the words for it.

    Attributes:
        name: of the warning.
        needs: names of the values that it looks at.
        ill: `ill(probes) -> bool`, of the newest `probes` probes, the newest last.
        words: a template for the newest values.
        probes: how many it looks at.
    """

    name: str
    needs: tuple[str, ...]
    ill: Callable[[Sequence[Values]], bool]
    words: str
    probes: int = _ENOUGH


def _each(ill: Callable[[Values], bool]) -> Callable[[Sequence[Values]], bool]:
    return lambda probes: all(ill(values) for values in probes)


RANGES = (
    Range(
        "adjoint_residual",
        ("adjoint_residual",),
        _each(lambda v: v["adjoint_residual"] > 0.9),
        "v solves its system hardly better than v = 0 would (adjoint residual "
        "{adjoint_residual:.2g}; v = 0 has 1, healthy below 0.9). Deep networks stay near 1 while "
        "they train, in runs that work, too: look at the validation metric first. If that does "
        "not improve: v is too slow, train it for longer with x frozen, or lower the outer "
        "learning rate. Well above 1 the step of v, which is as z's unless set apart, is too long: "
        "lower the inner learning rate, or damp v (damping=)",
    ),
    Range(
        "negative_curvature",
        ("health/negative_curvature",),
        _each(lambda v: v["health/negative_curvature"] > 0.5),
        "the inner loss curves downwards along v on {health/negative_curvature:.0%} of the held "
        "minibatches (healthy below 50%): z is not near a minimum. Lower the outer learning rate, "
        "keep x frozen for longer at the start, or add weight decay to the inner loss or damping=",
    ),
    Range(
        "outer_still",
        ("health/outer_size",),
        lambda probes: len({v["health/outer_size"] for v in probes}) == 1 < len(probes),
        "x stands still: its size, {health/outer_size:.6g} times that at the start, is the same as "
        "at the last probe. Is the outer learning rate 0, does the schedule of x end too early, or "
        "does outer_params not reach the inner loss?",
    ),
    Range(
        "outer_size",
        ("health/outer_size",),
        _each(lambda v: v["health/outer_size"] > 20.0),
        "the entries of x are {health/outer_size:.3g} times what they were at the start (healthy "
        "below 20): x has run away, and weights made of it are all or nothing. Lower the outer "
        "learning rate",
        probes=1,
    ),
    Range(
        "hypergradient_cosine",
        ("hypergradient_cosine", "health/reference_residual"),
        # Against a reference that is itself far from solved, a low cosine says nothing.
        _each(lambda v: v["hypergradient_cosine"] < 0.3 and v["health/reference_residual"] < 0.5),
        "D_x points elsewhere than the hypergradient (cosine {hypergradient_cosine:.2g}, healthy "
        "above 0.3). v lags behind: lower the outer learning rate, or train v longer with x frozen",
        probes=1,
    ),
    Range(
        "memorisation",
        ("health/loss_seen", "health/loss_held_out", "health/loss_gap_error"),
        _each(
            lambda v: (
                v["health/loss_held_out"] - 2 * v["health/loss_gap_error"]
                > 1.5 * v["health/loss_seen"]
            )
        ),
        "x fits the outer data that it learns from: their loss is {health/loss_seen:.3g}, that of "
        "held-out ones {health/loss_held_out:.3g} (healthy below 1.5 times). Stop earlier, lower "
        "the outer learning rate, or give F more data",
    ),
)


class Watch:
    """Reads the lines of `metrics.jsonl` one by one, and says what a new one gives reason to say.

    The same is said again only when twice as many steps have passed, so a run has few warnings.

    Args:
        rows: lines that are there already, values and warnings, the newest last.
        known: what there is to say whatever the lines hold, by name.

    Example:
        >>> watch = Watch([{"step": 100, "adjoint_residual": 12.0}])
        >>> list(watch({"step": 200, "adjoint_residual": 12.0}))
        ['adjoint_residual']
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]] = (), known: Mapping[str, str] | None = None
    ) -> None:
        # Only the newest probes: a run has too many lines to walk over at each of them.
        self._probes = {one.name: collections.deque[Values](maxlen=one.probes) for one in RANGES}
        self._last_step: dict[str, int] = {}
        self._known = dict(known or {})
        for row in rows:
            self._read(row)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Reads a line of values; returns the warnings that it gives reason for, by name."""
        texts = {}
        for one in self._read(row):
            probes = self._probes[one.name]
            if len(probes) == one.probes and one.ill(probes):
                texts[one.name] = one.words.format_map(probes[-1])
        due = {name: text for name, text in (texts | self._known).items() if self._due(name, row)}
        self._last_step.update(dict.fromkeys(due, int(row["step"])))
        return due

    def _due(self, name: str, row: Mapping[str, Any]) -> bool:
        last = self._last_step.get(name)
        return last is None or row["step"] >= 2 * last

    def out_of_range(self) -> dict[str, str]:
        """What the newest probes say, each by itself: the words for those that are out of range."""
        return {
            one.name: one.words.format_map(probes[-1])
            for one in RANGES
            if (probes := self._probes[one.name]) and one.ill(list(probes)[-1:])
        }

    def _read(self, row: Mapping[str, Any]) -> list[Range]:
        """Takes a line in; returns the ranges that it has the values for."""
        names = [key.removeprefix(PREFIX) for key in row if key.startswith(PREFIX)]
        self._last_step.update(dict.fromkeys(names, int(row["step"])))
        measured = []
        for one in RANGES:
            if all(name in row for name in one.needs):
                values = {name: float(row[name]) for name in one.needs}
                if all(math.isfinite(value) for value in values.values()):
                    self._probes[one.name].append(values)
                    measured.append(one)
        return measured
