"""TensorBoard, and all writers of a run behind a front that no failing one gets through.

The method names and arguments are those of clu's `MetricWriter`; of them a run calls
`write_scalars`, `write_texts`, `flush` and `close`, so any object that has these four is a writer.
"""

from __future__ import annotations

import contextlib
import functools
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

from bilevel_flax.train.metrics.jsonl import JsonlWriter
from bilevel_flax.train.metrics.scalars import number

_messages: Any = event_pb2  # made at run time, so a type checker knows none of its classes
# That a run waits for its writers, all of them together: twice, it is still less than the ten
# seconds in which a run ends after SIGTERM.
_SECONDS = 2.0
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


class TensorBoardWriter:
    """Writes TensorBoard event files with tensorboardX's format code, and without its thread.

    `tensorboardX.SummaryWriter` writes from a thread behind a queue of ten; where the disk is full
    for a moment the thread dies, the queue fills, and the caller waits for ever. Here a failure is
    an exception of the call that it belongs to; the first of them makes the file.

    Args:
        directory: The folder of the event files; it is made.
        purge_step: On resuming, the first step that will be written again: TensorBoard then
            hides what the interrupted run had written from there on.
    """

    def __init__(self, directory: str | Path, *, purge_step: int | None = None) -> None:
        self._directory, self._purge_step = Path(directory), purge_step
        self._flushed = time.monotonic()

    @functools.cached_property
    def _file(self) -> event_file_writer.EventsWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        # The file's name has its second: two sessions may begin in one.
        file = event_file_writer.EventsWriter(str(self._directory / "events"), f".{os.getpid()}")
        if self._purge_step is not None:
            start = _messages.SessionLog(status=_messages.SessionLog.START)
            file.write_event(_event(self._purge_step, session_log=start))
        return file

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""
        for name, value in scalars.items():
            self._write(step, summary=summary.scalar(name, number(name, value)))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text (markdown) per name."""
        for name, text in texts.items():
            self._write(step, summary=summary.text(name, text))

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(_event(step, **content))
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Forces the events written so far to the disk."""
        self._flushed = time.monotonic()
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the event file, if anything was written."""
        if "_file" in self.__dict__:
            self._file.close()


def _event(step: int, **content: Any) -> Any:
    return _messages.Event(wall_time=time.time(), step=int(step), **content)


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
    board = TensorBoardWriter(workdir / "tensorboard", purge_step=step + 1)
    return MultiWriter([lines, board, *writers], log)


class MultiWriter:
    """Hands every call to each of several writers; what they do never stops or hangs a run.

    Each writer works in a thread of its own. A call returns when all of them are done with it, or
    after two seconds: a writer that has not answered by then is no longer waited for (its calls
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
        """Closes each writer, in two seconds at most; a second call does nothing."""
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
        self._lock = threading.Lock()  # both the run and the writer's thread may leave it out
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
        with self._lock:
            was_out, self._is_out = self._is_out, True
        if not was_out:
            self._log(
                f"metrics: {type(self._writer).__name__} failed ({why[:200]}); the run goes on "
                "without it"
            )
