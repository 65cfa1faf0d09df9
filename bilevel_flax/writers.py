"""Metric writers with the method names of clu's `MetricWriter`, without tensorflow.

`clu.metric_writers` imports tensorflow, so its interface class cannot be inherited from here. A
writer below can stand wherever a clu writer is asked for scalars, images, histograms, texts or
hyperparameters, and a clu writer (where tensorflow is installed) can stand in a `MultiWriter`.

Example:
    >>> import contextlib, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with contextlib.closing(JsonlWriter(path)) as writer:
    ...     writer.write_scalars(10, {"inner_loss": 0.5, "outer_loss": float("nan")})
    >>> read_metrics(path)
    [{'step': 10, 'inner_loss': 0.5, 'outer_loss': 'NaN'}]
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from tensorboardX import SummaryWriter


class MetricWriter(Protocol):
    """What a training loop asks of a writer; the names and arguments are clu's."""

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""

    def write_images(self, step: int, images: Mapping[str, ArrayLike]) -> None:
        """Writes images, [h, w, c] or [n, h, w, c], uint8 or float in [0, 1]."""

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, ArrayLike],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes the distribution of each array's entries."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the run's hyperparameters, a flat mapping."""

    def flush(self) -> None:
        """Brings everything written so far to the disk."""

    def close(self) -> None:
        """Flushes and closes; nothing may be written afterwards."""


class JsonlWriter:
    """Appends values to a file, one JSON object a line: `{"step": 10, "inner_loss": 0.5}`.

    Every line is strict JSON: a number that is not finite becomes the string `"NaN"`,
    `"Infinity"` or `"-Infinity"`, which `float()` reads back. Lines reach the operating system
    at once (a killed process loses nothing); `flush` forces them to the disk.

    Texts get a line of their own. Images, histograms and hyperparameters have no place in this file
    and are dropped.

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
        line = {"step": int(step)} | {k: _json_number(k, v) for k, v in scalars.items()}
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def write_images(self, step: int, images: Mapping[str, ArrayLike]) -> None:
        """Does nothing: images have no place in a JSON line."""

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, ArrayLike],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Does nothing: arrays have no place in a JSON line."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Appends one line, if there is a text."""
        if texts:
            self._append({"step": int(step), **texts})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Does nothing: the run's config is a file of its own."""

    def flush(self) -> None:
        """Forces the lines written so far to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()


def _keep_lines(path: Path, last_step: int | None) -> None:
    """Rewrites the file with its whole lines up to `last_step`, if that changes anything."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if line.endswith(b"\n") and (
            last_step is None or _parse(path, number, line)["step"] <= last_step
        ):
            kept += line
    if kept == content:
        return
    # Replaced in one go: a kill in the middle leaves the old file or the new one.
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with an integer step, got "
            f"{line[:60]!r}; mend or remove the file"
        )
    return row


def _number(name: str, value: ArrayLike) -> int | float:
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16 and its like have the kind of raw bytes
        array = array.astype(np.float32)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"scalar {name!r}: expected one number, got {value!r:.60} of shape {array.shape}"
        )
    if array.dtype == np.float32:
        # The shortest decimal that is this float32: 0.1, not 0.10000000149011612.
        return float(str(array.reshape(())[()]))
    return array.item()


def _json_number(name: str, value: ArrayLike) -> int | float | str:
    number = _number(name, value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


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


class TensorBoardWriter:
    """Writes TensorBoard event files through tensorboardX.

    Args:
        directory: The folder of the event files; it is made.
        purge_step: On resuming, the first step that will be written again: TensorBoard then
            hides what the interrupted run had written from there on.
    """

    def __init__(self, directory: str | Path, *, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, _number(name, value), step)

    def write_images(self, step: int, images: Mapping[str, ArrayLike]) -> None:
        """Writes [h, w, c] or [n, h, w, c] images, uint8 or float in [0, 1]; n make one grid."""
        for name, value in images.items():
            image = np.asarray(value)
            if image.ndim not in (3, 4) or image.shape[-1] not in (1, 3, 4):
                raise ValueError(
                    f"image {name!r}: expected [h, w, c] or [n, h, w, c] with 1, 3 or 4 "
                    f"channels, got shape {image.shape}"
                )
            if image.ndim == 3:
                self._writer.add_image(name, image, step, dataformats="HWC")
            else:
                self._writer.add_images(name, image, step, dataformats="NHWC")

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, ArrayLike],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes the distribution of each array's finite entries (30 buckets unless told)."""
        for name, value in arrays.items():
            entries = np.asarray(value, dtype=np.float64).ravel()
            entries = entries[np.isfinite(entries)]
            if entries.size:
                counts, edges = np.histogram(entries, (num_buckets or {}).get(name, 30))
                self._writer.add_histogram_raw(
                    name,
                    min=entries.min(),
                    max=entries.max(),
                    num=entries.size,
                    sum=entries.sum(),
                    sum_squares=np.square(entries).sum(),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=step,
                )

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text (markdown) per name."""
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters as a table under the name `hparams`."""
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in sorted(hparams.items()))
        self._writer.add_text("hparams", "| name | value |\n|---|---|\n" + rows, 0)

    def flush(self) -> None:
        """Brings the events written so far to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class MultiWriter:
    """Hands every call to each of several writers, ours or clu's.

    Args:
        writers: The writers, called in order.
    """

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, ArrayLike]) -> None:
        """Writes images, [h, w, c] or [n, h, w, c]."""
        for writer in self._writers:
            writer.write_images(step, images)

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, ArrayLike],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes the distribution of each array's entries."""
        for writer in self._writers:
            writer.write_histograms(step, arrays, num_buckets)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the run's hyperparameters."""
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        """Flushes each writer."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes each writer, also when one of them fails to."""
        errors: list[Exception] = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
