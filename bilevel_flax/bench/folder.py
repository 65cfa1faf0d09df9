"""The folder of one bench: what it belongs to, who is writing to it."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_flax.train import workdir
from bilevel_flax.train.config import ConfigError


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it until the block is left.

    Raises:
        ConfigError: it cannot be made or written to, or another process is at work in it.
    """
    with workdir.lock(out, "--out", marks=()):
        yield


def check_same_bench(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Makes sure that the folder's results, if there are any, were made with these settings.

    Rows of different budgets, grids or data must not be compared. A folder without results is
    free. What an older bench did not write down is taken to be the same.

    Args:
        out: the folder.
        settings: what may not change, as JSON.

    Returns:
        What the folder's results were made with; empty where it is free.

    Raises:
        ConfigError: they belong to another bench, whose differing settings are named.
    """
    path = out / "bench.json"
    before = workdir.read_json(path) if path.exists() and _has_results(out) else {}
    if not isinstance(before, Mapping):
        raise ConfigError(f"{path} is damaged: use another --out")
    different = [
        f"{key} {before[key]!r}, not {value!r}"
        for key, value in settings.items()
        if key in before and before[key] != value
    ]
    if different:
        raise ConfigError(
            f"--out={out} holds another bench ({'; '.join(different)}): give the same options to "
            "go on with it, or another --out"
        )
    return dict(before)


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes down what the folder's results are made with, after `check_same_bench`."""
    workdir.write_json(out / "bench.json", {**check_same_bench(out, settings), **settings})


def _has_results(out: Path) -> bool:
    for name in ("results.csv", "genotypes.csv"):
        with contextlib.suppress(FileNotFoundError), (out / name).open(encoding="utf-8") as file:
            if len(file.readlines(2**16)) > 1:  # beside the header
                return True
    return False


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table in one step: a killed process leaves the old one or the new one."""
    with workdir.replaced(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
