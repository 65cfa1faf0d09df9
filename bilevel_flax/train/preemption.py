"""Turns SIGTERM and Ctrl-C into a request that a loop answers at its next safe point."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any, Self

from bilevel_flax import deprecated


class PreemptionGuard:
    """While entered, the first SIGTERM or Ctrl-C only sets `received`.

    A second Ctrl-C raises KeyboardInterrupt at once, for the user who cannot wait. The handlers of
    before are put back on exit. Signals that the process ignores (Ctrl-C of a job started with
    nohup) stay ignored, and outside the main thread, where Python allows no handlers, nothing
    happens.

    Args:
        signals: what to guard against. With several processes, ask all of them
            (`Channel.all_gather`) before acting on it: a preemption may reach one host only.
        grace_seconds: ends the process where it has not left the block so many seconds after the
            signal, whatever it waits for: a compiler, a full queue, a dead disk. None: never.

    Example:
        >>> with PreemptionGuard() as guard:
        ...     for step in range(3):
        ...         if guard.received is not None:
        ...             break  # and save
    """

    def __init__(
        self,
        signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
        grace_seconds: float | None = None,
    ):
        self.received: signal.Signals | None = None
        """The first signal since entering; None while there was none."""
        self._signals = tuple(signals)
        self._grace = grace_seconds
        self._deadline = 0.0
        self._lock = threading.Lock()
        self._previous: dict[signal.Signals, Any] = {}
        self._interrupts = 0
        self._left = threading.Event()
        self._pipe: tuple[int, int] | None = None  # (the system's end, the wakeup fd of before)

    def __enter__(self) -> Self:
        self.received, self._interrupts = None, 0
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                previous = signal.getsignal(number)
                # None: a handler that is not Python's, which could not be put back.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
            if self._grace is not None and self._previous:
                self._watch(self._grace)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def extend(self, seconds: float) -> None:
        """Moves the end of the grace to `seconds` from now, if that is later."""
        with self._lock:
            self._deadline = max(self._deadline, time.monotonic() + seconds)

    def _watch(self, grace: float) -> None:
        # A Python handler runs only between two instructions of the main thread, which may be
        # inside XLA for minutes; this pipe is written by the C handler, at once.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._pipe = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._left.clear()
        self._deadline = 0.0
        watched = {int(number) for number in self._previous}

        def wait() -> None:
            number = 0
            while number not in watched:
                byte = os.read(reader, 1)
                if not byte:
                    os.close(reader)
                    return
                number = byte[0]
            self.extend(grace)  # a loop that was quicker has asked for less
            while not self._left.wait(min(1.0, max(0.01, self._deadline - time.monotonic()))):
                if time.monotonic() >= self._deadline:
                    name = signal.Signals(number).name
                    _say(
                        f"{name}: no safe point was reached in time; the same command goes on "
                        "from the last checkpoint"
                    )
                    os._exit(128 + number)
            os.close(reader)

        threading.Thread(target=wait, name="preemption", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._left.set()
        if self._pipe is not None:
            writer, before = self._pipe
            signal.set_wakeup_fd(before)
            os.close(writer)
            self._pipe = None
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)


def _say(line: str) -> None:
    # Whoever reads the other end of a pipe may have stopped, and a write waits for that.
    saying = threading.Thread(target=lambda: print(line, file=sys.stderr, flush=True), daemon=True)
    saying.start()
    saying.join(0.5)


__getattr__ = deprecated.names(__name__)
