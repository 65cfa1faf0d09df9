"""A directory of checkpoints: which steps it has, and the newest of them that is sound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from bilevel_flax.checkpoints.errors import CheckpointError, Damaged, reason
from bilevel_flax.checkpoints.format import TEMPORARY, orbax
from bilevel_flax.checkpoints.processes import Processes

if TYPE_CHECKING:
    from etils import epath

_T = TypeVar("_T")


def absolute(directory: str | os.PathLike[str]) -> epath.Path:
    """A local path made absolute, as Orbax wants it; a URL (`gs://...`) as it is."""
    orbax()  # first, for the message where it is missing: epath comes with it
    from etils import epath

    path = os.fspath(directory)
    return epath.Path(path if "://" in path else os.path.abspath(path))


def make_directory(directory: epath.Path) -> None:
    """Makes the directory, or raises CheckpointError if it cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if "://" not in str(directory) and not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError("Permission denied")
    except OSError as error:
        raise CheckpointError(
            f"directory={str(directory)!r}: checkpoints cannot be written there "
            f"({reason(error)}); choose another."
        ) from error


def list_steps(directory: epath.Path) -> list[int]:
    """The steps that have a directory, damaged ones included, in increasing order."""
    # Orbax's own listing may leave out a step that lost a file, and a run would then start from
    # scratch without a word.
    if not directory.exists():
        return []
    names = (path.name for path in directory.iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def newest_sound(
    directory: epath.Path,
    read: Callable[[epath.Path, int], _T],
    only: int | None = None,
    processes: Processes | None = None,
) -> tuple[_T | None, dict[int, str]]:
    """What `read` makes of the newest checkpoint of which it does not raise `Damaged`.

    Args:
        directory: of all checkpoints.
        read: reads one, from its path and step.
        only: consider this step alone.
        processes: who must look at the same steps; None: this process looks alone.

    Returns:
        What `read` returned, None if there is no checkpoint at all; and why newer ones were passed
        over, by step.

    Raises:
        CheckpointError: there are checkpoints, but none can be read; or `only` is not there.
    """
    steps = list_steps(directory)
    if processes is not None:
        # A network's file system may show them to one process later than to another.
        steps = processes.broadcast(steps)
    if only is not None and only not in steps:
        raise CheckpointError(f"step={only}: {str(directory)!r} has the steps {steps}.")
    damaged: dict[int, str] = {}
    for step in reversed(steps) if only is None else [only]:
        try:
            return read(directory / str(step), step), damaged
        except Damaged as error:
            damaged[step] = str(error)
    if damaged:
        # They all stay in place: the next run must find them too, not start from scratch.
        details = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise CheckpointError(
            f"No checkpoint in {str(directory)!r} is sound ({details}). Bring back the files, or "
            "move the directory away to start from scratch."
        )
    return None, damaged


def prepare(path: epath.Path, items: Iterable[str]) -> None:
    """Makes the folder in which a checkpoint is put together, and deletes what is left of others.

    At once, not after the next save: on a full disk the remains are in the way.
    """
    discard(path.parent)
    for item in items:
        (path / item).mkdir(parents=True)


def discard(directory: epath.Path) -> None:
    """Deletes what is left of saves that did not come to their end."""
    for path in directory.glob(f"*{TEMPORARY}*"):
        path.rmtree()


def commit(path: epath.Path, step: int, keep: int) -> None:
    """Makes a finished folder the checkpoint of its step, and deletes all but the newest `keep`."""
    directory = path.parent
    path.rename(directory / str(step))
    for old in list_steps(directory)[:-keep]:
        # Renamed first: a kill in the middle of the deletion leaves no half of a checkpoint.
        doomed = directory / f"{old}{TEMPORARY}"
        (directory / str(old)).rename(doomed)
        doomed.rmtree()


def move_aside(directory: epath.Path, step: int) -> str:
    """Moves a damaged checkpoint to `damaged/`, out of the way of saves; says what became of it."""
    target = directory / "damaged" / str(step)
    try:
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            target.rmtree()
        (directory / str(step)).rename(target)
    except OSError as error:
        return f"It could not be moved aside: {reason(error)}."
    return f"It was moved to {str(target)!r}."
