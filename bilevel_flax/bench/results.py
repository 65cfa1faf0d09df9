"""`results.csv` of a bench: one row an evaluation, and a mark on the last row of a run.

A run without its mark was cut off; it is dropped when the file is read and done again.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bilevel_flax.bench.folder import write_csv

FINISHED, SCREENED, DIVERGED = "finished", "screened", "diverged"


class Key(NamedTuple):
    """What names a run within a bench."""

    solver: str
    seed: int
    params: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
        task: name of the task.
        solver: name of the method.
        seed: of the run.
        params: the steps, "rho=8,ratio=1".
        iteration: updates so far.
        seconds: wall time of updates and full passes, without compilation and evaluation.
        cpu_seconds: CPU time of all threads, of the same.
        oracle_units: gradients, HVPs and cross-JVPs of minibatches so far, full passes included.
        value: h, or the test error in [0, 1]; NaN once diverged.
        gap: value minus the best one (`BenchTask.best`) as far as that was known.
        validation: what steps are selected by.
        status: "" within a run; in its last row "finished", "screened" (the same, measured at few
            times: a pair of a grid) or "diverged".
        screened: `validation` at the end of the same run in the grid, where there was one. A budget
            in seconds ends two runs at different steps, and the choice of a pair must not change
            when its run is done again.
    """

    task: str
    solver: str
    seed: int
    params: str
    iteration: int
    seconds: float
    cpu_seconds: float
    oracle_units: float
    value: float
    gap: float
    validation: float
    status: str
    screened: float = math.nan

    @property
    def key(self) -> Key:
        """The run that it belongs to."""
        return Key(self.solver, self.seed, self.params)


Runs = dict[Key, list[Row]]
_FIELDS = {field.name: field.type for field in dataclasses.fields(Row)}
COLUMNS = tuple(_FIELDS)


def params_text(rho: float, ratio: float) -> str:
    """The steps as they stand in `params`.

    >>> params_text(8.0, 10 ** -0.5)
    'rho=8,ratio=0.316228'
    """
    return f"rho={rho:.6g},ratio={ratio:.6g}"


def read(path: Path) -> Runs:
    """The complete runs of a file; what was cut off is left out.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return {}
    runs: Runs = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) not in (COLUMNS, ()):
            raise ValueError(
                f"{path} has the columns {', '.join(reader.fieldnames or ())}, which no bench "
                "wrote: use another --out"
            )
        for line in reader:
            row = _parsed(line)
            if row is not None:
                runs.setdefault(row.key, []).append(row)
    return {key: rows for key, rows in runs.items() if rows[-1].status}


def _parsed(line: dict[str, str | None]) -> Row | None:
    values = [line.get(name) for name in COLUMNS]
    if None in values or len(line) != len(COLUMNS):
        return None
    casts = {"str": str, "int": int, "float": float}
    try:
        return Row(**{n: casts[str(_FIELDS[n])](v) for n, v in zip(COLUMNS, values, strict=True)})
    except ValueError:
        return None


def write(path: Path, runs: Runs) -> None:
    """Replaces the file in one step."""
    write_csv(path, COLUMNS, _as_text(row for rows in runs.values() for row in rows))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows at the end of a file that `write` made."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(_as_text(rows))


def _as_text(rows: Iterable[Row]) -> Iterator[list[str]]:
    for row in rows:
        values = [getattr(row, name) for name in COLUMNS]
        yield [repr(float(v)) if isinstance(v, float) else str(v) for v in values]


def with_gaps(rows: Iterable[Row], best: float) -> list[Row]:
    """The rows with their gaps to `best`."""
    return [dataclasses.replace(row, gap=row.value - best) for row in rows]


def score(rows: list[Row]) -> float:
    """What a run's steps are selected by: its last validation metric; infinite once diverged."""
    last = rows[-1]
    if math.isfinite(last.screened):
        return last.screened
    good = last.status in (FINISHED, SCREENED) and math.isfinite(last.validation)
    return last.validation if good else math.inf


def time_below(rows: list[Row], level: float, clock: str) -> float:
    """When the gap fell below `level` to stay there; infinite if it did not.

    Args:
        rows: a run, in order.
        level: in units of `gap`.
        clock: "seconds", "cpu_seconds" or "oracle_units".
    """
    since = math.inf
    for row in rows:
        if not row.gap < level:  # NaN is no success
            since = math.inf
        elif since == math.inf:
            since = getattr(row, clock)
    return since
