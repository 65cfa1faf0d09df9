"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import tqdm


def _shown(scalars: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())


class Progress:
    """Step, speed, time left and the newest values.

    Args:
        total: steps of the whole run.
        initial: steps that were done before.
        stream: where to; standard error by default.
        every_seconds: the least time between two plain lines.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._total, self._step, self._every = total, initial, every_seconds
        self._scalars: dict[str, float] = {}
        self._began, self._first = time.monotonic(), initial
        self._spoke = self._began
        self._bar: Any = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=initial, unit="step", file=self._stream, dynamic_ncols=True
            )

    def update(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
        """Moves to `step`; new scalars are shown beside it until they are replaced."""
        self._scalars |= scalars or {}
        if self._bar is not None:
            self._bar.set_postfix_str(_shown(self._scalars), refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        now = time.monotonic()
        if self._bar is None and (now - self._spoke >= self._every or step == self._total):
            self._spoke = now
            speed = (step - self._first) / max(now - self._began, 1e-9)
            left = (self._total - step) / speed if speed else float("inf")
            print(
                f"step {step}/{self._total}  {speed:.4g} step/s  {left:.0f} s left  "
                f"{_shown(self._scalars)}",
                file=self._stream,
                flush=True,
            )

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
