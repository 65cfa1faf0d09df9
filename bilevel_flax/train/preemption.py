"""Turns SIGTERM and Ctrl-C into a request that a loop answers at its next safe point."""

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self


class SignalGuard:
    """While entered, the first SIGTERM or Ctrl-C only sets `received`.

    A second Ctrl-C raises KeyboardInterrupt at once, for the user who cannot wait. The handlers of
    before are put back on exit. Signals that the process ignores (Ctrl-C of a job started with
    nohup) stay ignored, and outside the main thread, where Python allows no handlers, nothing
    happens.

    Args:
        signals: what to guard against. With several processes, ask all of them (`Channel.exchange`)
            before acting on it: a preemption may reach one host only.

    Example:
        >>> with SignalGuard() as guard:
        ...     for step in range(3):
        ...         if guard.received is not None:
        ...             break  # and save
    """

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGINT)):
        self.received: signal.Signals | None = None
        """The first signal since entering; None while there was none."""
        self._signals = tuple(signals)
        self._previous: dict[signal.Signals, Any] = {}
        self._interrupts = 0

    def __enter__(self) -> Self:
        self.received, self._interrupts = None, 0
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                previous = signal.getsignal(number)
                # None: a handler that is not Python's, which could not be put back.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)
