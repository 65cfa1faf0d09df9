"""What ends in one line, and what in a stack trace.

* A `UserError`, and any other ValueError, TypeError or OSError that a `raise` statement of the
  project's own code (the package, the example, the config) made, was written for the user: one
  line, exit code 2.
* A run that fails as a whole says why in one line: a direction that is not finite, a checkpoint
  that cannot be written, a full disk (1); an interruption (130, 143).
* Everything else, a ValueError out of NumPy or JAX included, is a bug here or in the task, and is
  shown with its stack trace (1).

With BILEVEL_FLAX_TRACEBACK=1 in the environment the stack trace is always shown.
"""

from __future__ import annotations

import dis
import sys
from pathlib import Path

from bilevel_flax.distribution import extras, recipes, shipped


def verdict(error: BaseException) -> tuple[str | None, int]:
    """(the line that says all, or None where a stack trace is needed; the exit code)."""
    if missing := extras.explain(error):
        return f"error: {missing}", 2
    if isinstance(error, recipes.RecipeError):
        return f"error: {error}", 2
    from bilevel_flax.checkpoints.checkpointer import CheckpointError
    from bilevel_flax.checks import UserError
    from bilevel_flax.train.errors import Diverged, Interrupted
    from bilevel_flax.train.multihost import PeerError
    from bilevel_flax.train.workdir import DiskFullError

    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint", 130
    if isinstance(error, Interrupted):
        return str(error), 128 + error.signal
    if isinstance(error, Diverged | CheckpointError | DiskFullError | PeerError):
        return f"error: {error}", 1
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, ValueError | TypeError | OSError) and _is_raised_by_us(error):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        return f"error: {error} (BILEVEL_FLAX_TRACEBACK=1 shows where)", 1
    return None, 1


def _is_raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of this project made it, not Python or an installed package."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    frame, code = last.tb_frame, last.tb_frame.f_code
    module = frame.f_globals.get("__name__", "").partition(".")[0]
    foreign = module in sys.stdlib_module_names or {"site-packages", "dist-packages"} & set(
        Path(code.co_filename).parts
    )
    # int("x") of a task's own line has that line as its last frame too, but it raised nothing.
    is_raise = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    ours = module == "bilevel_flax" or Path(code.co_filename).is_relative_to(shipped.root())
    return is_raise and (ours or not foreign)
