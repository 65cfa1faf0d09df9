"""Results as they stand in a page: a table, and the line that says where they come from."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table.

    Example:
        >>> print(table(["method", "error"], [["soba", 0.1]]))
        | method | error |
        |---|---|
        | soba | 0.1 |
    """
    lines = [header, *rows]
    cells = ["| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join([cells[0], "|---" * len(header) + "|", *cells[1:]])


def _module(script: Path) -> str:
    """How a script of the checkout is run: one of benchmarks/ by its path, any other by `-m`."""
    folders = script.resolve().with_suffix("").parts
    if script.parent.name == "benchmarks":
        return f"python benchmarks/{script.name}"
    tops = [i for i, name in enumerate(folders) if name in ("bilevel_flax", "examples")]
    return f"python -m {'.'.join(folders[tops[-1] :])}" if tops else f"python {script.name}"


def caption(arguments: Sequence[str] | None = None) -> str:
    """The command, the machine, the versions and the date.

    Args:
        arguments: of the command; None: those of this process.
    """
    program, *rest = sys.argv if arguments is None else arguments
    script = Path(program)
    name = _module(script) if script.suffix == ".py" else script.name
    given = shlex.join(word for word in rest if word != "--markdown")
    stack = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    load = f"load {os.getloadavg()[0]:.0f} at the end" if hasattr(os, "getloadavg") else ""
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}, {load})"
    return (
        f"`{name} {given}`".replace(" `", "`")
        + f": {machine}, Python {platform.python_version()}, {stack}, {datetime.date.today()}."
    )
