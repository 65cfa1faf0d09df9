"""Metric writers: lines of JSON, TensorBoard, and a front that no failing writer gets through.

The method names and arguments are those of clu's `MetricWriter`; of them a run calls
`write_scalars`, `write_texts`, `flush` and `close`, so any object that has these four is a writer.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import ArrayLike
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from bilevel_flax.train.metrics.scalars import number

_messages: Any = event_pb2  # made at run time, so a type checker knows none of its classes
# That a run waits for its writers, all of them together: twice, it is still less than the ten
# seconds in which a run ends after SIGTERM.
_SECONDS = 3.0
_FLUSH_SECONDS = 10.0  # between two times that TensorBoard's events reach the disk
_PENDING = 1000  # calls that a writer may lag behind


class MetricWriter(Protocol):
    """What a run asks of a writer."""

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""

    def flush(self) -> None:
        """Brings everything written so far to the disk."""

    def close(self) -> None:
        """Flushes and closes; nothing may be written afterwards."""


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
    # Replaced in one go: a kill in the middle leaves the old file or the new one.
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(keep)
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


def _json_number(name: str, value: ArrayLike) -> int | float | str:
    plain = number(name, value)
    if math.isfinite(plain):
        return plain
    return "NaN" if math.isnan(plain) else "Infinity" if plain > 0 else "-Infinity"


class TensorBoardWriter:
    """Writes TensorBoard event files with tensorboardX's format code, and without its thread.

    `tensorboardX.SummaryWriter` writes from a thread behind a queue of ten; where the disk is full
    for a moment the thread dies, the queue fills, and the caller waits for ever. Here a failure is
    an exception of the call that it belongs to.

    Args:
        directory: The folder of the event files; it is made.
        purge_step: On resuming, the first step that will be written again: TensorBoard then
            hides what the interrupted run had written from there on.
    """

    def __init__(self, directory: str | Path, *, purge_step: int | None = None) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        # The file's name has its second: two sessions may begin in one.
        suffix = f".{os.getpid()}"
        self._file = event_file_writer.EventsWriter(str(Path(directory) / "events"), suffix)
        self._flushed = time.monotonic()
        if purge_step is not None:
            start = _messages.SessionLog(status=_messages.SessionLog.START)
            self._write(purge_step, session_log=start)

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""
        for name, value in scalars.items():
            self._write(step, summary=summary.scalar(name, number(name, value)))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text (markdown) per name."""
        for name, text in texts.items():
            self._write(step, summary=summary.text(name, text))

    def _write(self, step: int, **content: Any) -> None:
        event = _messages.Event(wall_time=time.time(), step=int(step), **content)
        self._file.write_event(event)
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Forces the events written so far to the disk."""
        self._flushed = time.monotonic()
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._file.close()


def open_writers(
    workdir: Path, step: int, writers: Sequence[MetricWriter], log: Callable[[str], None]
) -> MultiWriter:
    """The writers of a run: `metrics.jsonl`, TensorBoard, and the user's own.

    Args:
        workdir: the run's folder.
        step: that the run goes on from; what was written beyond it is dropped.
        writers: the user's own.
        log: prints a line.

    Raises:
        ValueError: `metrics.jsonl` is damaged.
        TypeError: an object of `writers` is no writer.
    """
    lines = JsonlWriter(workdir / "metrics.jsonl")
    lines.truncate_after(step)
    own: list[MetricWriter] = [lines]
    try:
        own.append(TensorBoardWriter(workdir / "tensorboard", purge_step=step + 1))
    except OSError as error:
        log(f"metrics: TensorBoardWriter failed ({error}); the run goes on without it")
    return MultiWriter([*own, *writers], log)


class MultiWriter:
    """Hands every call to each of several writers; what they do never stops or hangs a run.

    Each writer works in a thread of its own. A call returns when all of them are done with it, or
    after three seconds: a writer that has not answered by then is no longer waited for (its calls
    queue up, and are made once it answers). A writer that raises, or lags 1,000 calls behind, is
    left out from there on. Either is said once.

    Args:
        writers: ours, clu's, or anything with the methods of `MetricWriter`.
        log: prints a line.

    Raises:
        TypeError: an object lacks one of the methods.
    """

    def __init__(self, writers: Sequence[MetricWriter], log: Callable[[str], None] = print) -> None:
        for writer in writers:
            for method in ("write_scalars", "write_texts", "flush", "close"):
                if not callable(getattr(writer, method, None)):
                    raise TypeError(
                        f"writers: {type(writer).__name__} has no method {method}(): pass objects "
                        "with the methods of clu.metric_writers.MetricWriter"
                    )
        self._workers = [_Worker(writer, log) for writer in writers]

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""
        self._call("write_scalars", step, dict(scalars))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""
        self._call("write_texts", step, dict(texts))

    def flush(self) -> None:
        """Flushes each writer."""
        self._call("flush")

    def close(self) -> None:
        """Closes each writer, in three seconds at most; a second call does nothing."""
        self._call("close")
        self._workers = []

    def _call(self, method: str, *args: Any) -> None:
        deadline = time.monotonic() + _SECONDS
        waiting = [(worker, worker.call(method, *args)) for worker in self._workers]
        for worker, done in waiting:
            worker.wait(done, deadline, patiently=method == "close")


class _Worker:
    """A writer in a thread of its own, which ends with the process whatever it waits for."""

    def __init__(self, writer: MetricWriter, log: Callable[[str], None]) -> None:
        self._writer, self._log = writer, log
        self._calls: queue.Queue[Any] = queue.Queue(_PENDING)
        self._is_late = self._is_out = False
        threading.Thread(target=self._run, daemon=True).start()

    def call(self, method: str, *args: Any) -> threading.Event:
        """Has a method called; returns what is set once that is done."""
        done = threading.Event()
        try:
            self._calls.put_nowait((method, args, done))
        except queue.Full:
            self._leave_out(f"it is {_PENDING} calls behind")
        return done

    def wait(self, done: threading.Event, deadline: float, *, patiently: bool) -> None:
        """Waits for a call; not for a writer that was late before, unless `patiently`."""
        if self._is_out or (self._is_late and not patiently):
            return
        if done.wait(max(0.0, deadline - time.monotonic())) or self._is_late:
            return
        self._is_late = True
        self._log(
            f"metrics: {type(self._writer).__name__} has not answered for {_SECONDS:g} s; the run "
            "goes on without waiting for it"
        )

    def _run(self) -> None:
        method = ""
        while method != "close":
            method, args, done = self._calls.get()
            try:
                if not self._is_out:
                    getattr(self._writer, method)(*args)
            except Exception as error:
                self._leave_out(" ".join(str(error).split()) or type(error).__name__)
                if method != "close":
                    with contextlib.suppress(Exception):
                        self._writer.close()
            done.set()

    def _leave_out(self, why: str) -> None:
        if not self._is_out:
            self._is_out = True
            self._log(
                f"metrics: {type(self._writer).__name__} failed ({why[:200]}); the run goes on "
                "without it"
            )
