"""A sign of life while something takes long: the last line again, with the seconds since then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self


class Heartbeat:
    """While entered, says every so often what is still going on.

    Args:
        log: prints a line.
        doing: what is going on, until a line is logged.
        seconds: of silence, before something is said.

    Example:
        >>> with Heartbeat(print, "baselines") as beat:
        ...     beat("baseline 1/2: no weights")  # then "...: 15 s so far", now and then
        baseline 1/2: no weights
    """

    def __init__(self, log: Callable[[str], None], doing: str, seconds: float = 15.0):
        self._log, self._doing, self._seconds = log, doing, seconds
        self._since = 0.0
        self._left = threading.Event()

    def __call__(self, line: str) -> None:
        """Logs a line; from now on this is what is going on."""
        self._doing, self._since = line, time.monotonic()
        self._log(line)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def _beat(self) -> None:
        while not self._left.wait(self._seconds):
            passed = time.monotonic() - self._since
            if passed >= 0.9 * self._seconds:
                self._log(f"... {self._doing}: {passed:.0f} s so far")

    def __exit__(self, *error: object) -> None:
        self._left.set()
