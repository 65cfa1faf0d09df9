"""Scalars and texts as lines of JSON, cut back to the step that a run resumes from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from bilevel_flax.train.metrics.scalars import number
from bilevel_flax.train.workdir import replaced


class JsonlWriter:
    """Appends values to a file, one JSON object a line: `{"step": 10, "inner_loss": 0.5}`.

    Every line is strict JSON: a number that is not finite becomes the string `"NaN"`,
    `"Infinity"` or `"-Infinity"`, which `float()` reads back. Lines reach the operating system
    at once (a killed process loses nothing); `flush` forces them to the disk. Texts get a line of
    their own.

    Args:
        path: The file; it is made, with its folder, or appended to.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line torn off by a kill would otherwise grow together with the next one.
        _keep_lines(self._path, None)
        self._file = self._path.open("ab")

    def truncate_after(self, step: int) -> None:
        """Drops what an interrupted run wrote beyond the checkpoint it resumes from.

        Afterwards the file is byte for byte that of an uninterrupted run at `step`.

        Args:
            step: The last step to keep.

        Raises:
            ValueError: If a whole line is not a JSON object with a `step`.
        """
        self._file.close()
        _keep_lines(self._path, step)
        self._file = self._path.open("ab")

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Appends one line.

        Args:
            step: The step at which the values were taken.
            scalars: Numbers or arrays with one element, by name.

        Raises:
            ValueError: If a value is not one number, or a name is `step`.
        """
        if "step" in scalars:
            raise ValueError("scalars holds the name 'step', which is the line's own: rename it")
        self._append({"step": int(step)} | {k: _json_number(k, v) for k, v in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Appends one line, if there is a text."""
        if texts:
            self._append({"step": int(step), **texts})

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def flush(self) -> None:
        """Forces the lines written so far to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads what a `JsonlWriter` wrote; a torn last line is left out.

    Args:
        path: The file `metrics.jsonl`.

    Returns:
        One dict a line, in file order; numbers that are not finite are strings that
        `float()` reads.

    Raises:
        ValueError: If a whole line is not a JSON object with a `step`.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True)
    return [
        _parse(path, number, line)
        for number, line in enumerate(lines, start=1)
        if line.endswith(b"\n")
    ]


def _keep_lines(path: Path, last_step: int | None) -> None:
    """Rewrites the file with its whole lines up to `last_step`, if that changes anything."""
    if not path.exists():
        return
    content = path.read_bytes()
    if last_step is None:
        keep = content[: content.rfind(b"\n") + 1]
    else:
        lines = content.splitlines(keepends=True)
        keep = b"".join(
            line
            for number, line in enumerate(lines, start=1)
            if line.endswith(b"\n") and _parse(path, number, line)["step"] <= last_step
        )
    if keep == content:
        return
    with replaced(path, "wb") as file:
        file.write(keep)


def _integer(digits: str) -> int | float:
    # A number that no float holds is read as infinite, like 1e999.
    return int(digits) if len(digits) < 300 else float(digits)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**63


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_int=_integer)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not _is_step(row.get("step")):
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with an integer step, got "
            f"{line[:60]!r}; mend or remove the file"
        )
    return row


def _json_number(name: str, value: ArrayLike) -> int | float | str:
    plain = number(name, value)
    if math.isfinite(plain):
        return plain
    return "NaN" if math.isnan(plain) else "Infinity" if plain > 0 else "-Infinity"
