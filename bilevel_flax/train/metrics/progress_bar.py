"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import tqdm

_BAR = "{bar:10} {n_fmt}/{total_fmt} {remaining} left  {desc}"


def _shown(scalars: Mapping[str, float], width: float = float("inf")) -> str:
    """As many values as fit."""
    line = ""
    for name, value in scalars.items():
        longer = f"{line}{'  ' if line else ''}{name} {value:.3g}"
        if len(longer) > width:
            break
        line = longer
    return line


class Progress:
    """Step, speed, time left and the newest values.

    The speed is that of the updates, without evaluations, compilation and checkpoints; the time
    left counts all of it from the first `update` on.

    Args:
        total: steps of the whole run.
        stream: where to; standard error by default.
        every_seconds: the least time between two plain lines.
        quiet: show nothing.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        quiet: bool = False,
    ):
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._total, self._every = total, every_seconds
        self._scalars: dict[str, float] = {}
        self._first: tuple[int, float] | None = None
        self._spoke = 0.0
        self._pace = ""
        self._bar: Any = None

    def update(
        self,
        step: int,
        scalars: Mapping[str, float] | None = None,
        pace: float | None = None,
    ) -> None:
        """Moves to `step`; what is given is shown beside it until it is replaced.

        Args:
            step: taken so far.
            scalars: by name.
            pace: updates a second.
        """
        if self._quiet:
            return
        if pace is not None:
            self._pace = f"{pace:.4g} step/s"
        self._scalars |= scalars or {}
        now = time.monotonic()
        if self._first is None:
            self._first, self._spoke = (step, now), now
            if self._stream.isatty():
                self._bar = tqdm.tqdm(
                    total=self._total,
                    initial=step,
                    unit="",
                    file=self._stream,
                    dynamic_ncols=True,
                    bar_format=_BAR,
                )
        if self._bar is not None:
            # The rest of the line takes about 35 columns and twice the number of steps.
            room = os.get_terminal_size(self._stream.fileno()).columns - 35
            shown = f"{self._pace}  " + _shown(self._scalars, room - 2 * len(str(self._total)))
            self._bar.set_description_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._spoke >= self._every or step == self._total:
            self._spoke = now
            self._say_where(step, now, *self._first)

    def _say_where(self, step: int, now: float, first_step: int, began: float) -> None:
        left = ""
        if step > first_step and now > began:
            seconds = (self._total - step) * (now - began) / (step - first_step)
            left = f"{seconds:.0f} s left"
        parts = [f"step {step}/{self._total}", self._pace, left, _shown(self._scalars)]
        self.say("  ".join(filter(None, parts)))

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
