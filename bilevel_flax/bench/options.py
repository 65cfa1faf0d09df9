"""What a bench is asked for, and the pairs of steps that its grids are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bilevel_flax.bench import methods, tasks
from bilevel_flax.train.config import ConfigError

SOLVERS = ("soba", "saba", "srba", "amigo")
CHOICES = ("clean", "noise", "model", "data", "steps")
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
RHOS = tuple(2.0**k for k in range(-5, 4))
RATIOS = tuple(10 ** (k / 2) for k in range(-4, 3))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        task: name of the task.
        solvers: names of the methods; None: the task's own.
        out: the folder for results.
        seconds: budget of a run; None: the task's own.
        seeds: runs with the chosen steps, seeds 0, 1, ...; None: the task's own number.
        grid: pairs (ρ, ρ/γ) that each method chooses from; 0 takes the recorded pair.
        manual_dir: folder of original data files.
        clock: "wall" or "cpu", what the budget is counted in.
        choices: `CHOICES` by name, as given; for `cleaning` alone.
        markdown: print the table as it stands in a results' page, under what was run where.
    """

    task: str
    solvers: tuple[str, ...] | None
    out: Path
    seconds: float | None = None
    seeds: int | None = None
    grid: int = 0
    manual_dir: str | None = None
    clock: str = "wall"
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    markdown: bool = False

    def with_solvers(self, default: tuple[str, ...]) -> tuple[Options, tuple[str, ...]]:
        """The options with a task's methods where none were asked for, and the methods."""
        solvers = default if self.solvers is None else self.solvers
        return dataclasses.replace(self, solvers=solvers), solvers

    def check_shared(self) -> None:
        """Raises on a mistake in what every protocol reads: task, seeds, out.

        Raises:
            ConfigError: names the option, its value and the fix.
        """
        tasks.check_name(self.task)
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"--seeds={self.seeds}: give 1 or more")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out={self.out}: a file is in the way, choose a folder")
        if self.choices and self.task != "cleaning":
            raise ConfigError(
                f"--{next(iter(self.choices))} is an option of `bench cleaning`: leave it out"
            )

    def check(self) -> None:
        """Raises on a mistake in anything.

        Raises:
            ConfigError: names the option, its value and the fix.
        """
        self.check_shared()
        methods.check_names(list(self.with_solvers(SOLVERS)[1]))
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ConfigError(f"--seconds={self.seconds}: give a positive number of seconds")
        if not 0 <= self.grid <= len(RHOS) * len(RATIOS):
            raise ConfigError(
                f"--grid={self.grid}: there are {len(RHOS) * len(RATIOS)} pairs of steps; give a "
                "number up to that, or 0 for the recorded pair"
            )
        if self.clock not in CLOCKS:
            raise ConfigError(f"--clock={self.clock}: choose one of {', '.join(CLOCKS)}")
        if self.manual_dir is not None and not Path(self.manual_dir).expanduser().is_dir():
            raise ConfigError(f"--manual-dir={self.manual_dir}: no such folder")


def grid(count: int) -> list[tuple[float, float]]:
    """`count` of the 63 published pairs (ρ, ρ/γ); a larger grid contains the smaller ones.

    >>> len(set(grid(63))), grid(5) == grid(9)[:5]
    (63, True)
    """
    pairs = [(rho, ratio) for rho in RHOS for ratio in RATIOS]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i] for i in order[:count]]
