"""The folder of one run: which config it belongs to, who is writing to it, JSON files in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_flax import deprecated
from bilevel_flax.checkpoints import checkpointer as checkpoint
from bilevel_flax.train import run_config
from bilevel_flax.train.config import config_differences
from bilevel_flax.train.errors import ConfigError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a run writes; any of it tells a folder that was begun by one.
_MARKS = ("config.json", "summary.json", "metrics.jsonl", "checkpoints", "tensorboard", "best.npz")


class DiskFullError(OSError):
    """The disk is full; the message names the workdir and says what is kept."""


@contextlib.contextmanager
def lock(workdir: Path, option: str = "--workdir", marks: Sequence[str] = _MARKS) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it until the block is left.

    Args:
        workdir: the folder.
        option: what the messages call it by.
        marks: names of which a folder that is not empty must hold one; empty: any folder will do.

    Raises:
        ConfigError: it cannot be made or written to, it holds something else than a run, or another
            process trains in it.
        DiskFullError: a file could not be written inside the block because the disk is full.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(
            f"{option}={workdir}: {error.strerror}, so it cannot be made; choose another folder"
        ) from error
    try:
        if not os.access(workdir, os.W_OK | os.X_OK):
            raise ConfigError(f"{option}={workdir}: not writable; choose another folder")
        names = sorted(p.name for p in workdir.iterdir() if not p.name.startswith("."))
        if marks and names and not any(mark in names for mark in marks):
            raise ConfigError(
                f"{option}={workdir}: the folder is not empty and holds no run "
                f"({', '.join(names[:3])}{' ...' if names[3:] else ''}); choose another folder"
            )
        try:
            # The system releases it however the process ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{option}={workdir}: another process is training in it; wait for its end, or "
                "choose another folder"
            ) from error
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            f"{option}={workdir}: {error.strerror}; what was saved is kept: make room, and the "
            "same command goes on"
        ) from error
    finally:
        os.close(descriptor)


def check_same_run(workdir: Path, record: Mapping[str, Any]) -> None:
    """Makes sure that the results in the folder, if there are any, are this config's.

    A folder without summary and checkpoint (a mistaken config, an early end) is free.

    Args:
        workdir: the folder.
        record: the config, plain (`config.plain`).

    Raises:
        ConfigError: they are another config's; the differing keys are named.
        CheckpointError: there are checkpoints, but none is sound.
    """
    saved = _saved_config(workdir)
    if saved is None:
        return
    # A key that the other one left out, or that was new since, has its default on both sides.
    before, now = run_config.completed(saved), run_config.completed(record)
    different = config_differences(before, now, run_config.RESUME_SAFE)
    if different:
        raise ConfigError(
            f"--workdir={workdir} holds a run with another config ({'; '.join(different)}): "
            "use that config to resume it, or another workdir"
        )


def _saved_config(workdir: Path) -> dict[str, Any] | None:
    if (workdir / "summary.json").exists() and (workdir / "config.json").exists():
        return read_json(workdir / "config.json")
    # A damaged checkpoint is reported when it is restored.
    with checkpoint.Checkpointer(
        workdir / "checkpoints", read_only=True, on_event=lambda line: None
    ) as checkpointer:
        newest = checkpointer.read_meta()
    return None if newest is None else newest[1]["config"]


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): bring it back or delete it") from error


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file; numbers that are not finite become null, which every reader knows."""
    with replaced(path) as file:
        file.write(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def replaced(path: Path, mode: str = "w") -> Iterator[Any]:
    """Opens a file to be written in one step: a killed process leaves the old one or the new one.

    Args:
        path: of the file, which keeps its content until the block is left without an error.
        mode: "w" for text, in UTF-8 and with line ends as they are written; "wb" for bytes.
    """
    partial = path.with_name(path.name + ".partial")
    # A link of that name, in a folder of somebody else's, must not be written through.
    partial.unlink(missing_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "", "errors": "replace"}
    with partial.open(mode.replace("w", "x"), **text) as file:  # pyright: ignore[reportArgumentType, reportCallIssue]
        yield file
        file.flush()
        os.fsync(file.fileno())  # or a crash may leave the new name with no content
    os.replace(partial, path)


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


__getattr__ = deprecated.names(__name__)
