"""Checkpoints: a state and its metadata, saved together, verified when read.

One directory holds the newest `keep` checkpoints, in Orbax's format and readable with Orbax alone:

    <directory>/<step>/     one checkpoint (`format`)
    <directory>/damaged/    what `restore` could not read, or not as it was written

A save writes into a temporary directory that is renamed when complete, so a killed or failed save
leaves nothing that looks like a checkpoint. With many processes every one makes the same calls and
writes and reads its own shards, in a directory that all of them see; what one number of processes
saved on one mesh is restored by any other: the template's shardings decide.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
import numpy as np

from bilevel_flax.checkpoints import collective, format
from bilevel_flax.checkpoints import directory as folders
from bilevel_flax.checkpoints.errors import CheckpointError, CheckpointMismatch, reason
from bilevel_flax.checkpoints.processes import Processes, SingleProcess
from bilevel_flax.checkpoints.records import Record
from bilevel_flax.checkpoints.restored import Restored
from bilevel_flax.checkpoints.shards import host_copy, is_spread
from bilevel_flax.checkpoints.template import Template

if TYPE_CHECKING:
    from etils import epath

__all__ = ["CheckpointError", "CheckpointMismatch", "Checkpointer", "Restored"]

_T = TypeVar("_T")
_logger = logging.getLogger("bilevel_flax")


class Checkpointer:
    """Saves a state and its metadata, and restores the newest checkpoint that is sound.

    Args:
        directory: where the checkpoints go; made if it does not exist. Any path that Orbax takes.
        keep: how many checkpoints to keep, the newest; with 1 there is none to fall back to.
        asynchronous: write in a background thread; `save` then blocks for a copy to host memory,
            and for the save before it if that still runs.
        on_event: called with one line of text for everything that a user should know (a failed
            save, a damaged checkpoint), possibly from the background thread. Default: a warning of
            the logger `bilevel_flax`.
        read_only: only read: nothing is made, moved or deleted, and `save` is refused. For programs
            that look into the directory of a running training.
        required: the first save is waited for, and raises if it fails, so that a run which cannot
            be saved ends before hours are lost. False: it is reported, as later ones are.
        processes: how the processes of this run talk to each other, where there are several; no
            other thread may use it meanwhile.

    Raises:
        ValueError: `keep` is below 1.
        CheckpointError: the directory cannot be made or written to, or Orbax is not installed.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> state = {"w": jnp.arange(3.0)}
        >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
        ...     checkpointer.save(10, state, {"epoch": 1})
        ...     restored = checkpointer.restore(state)
        >>> restored.step, restored.meta, restored.state["w"].tolist()
        (10, {'epoch': 1}, [0.0, 1.0, 2.0])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        asynchronous: bool = True,
        on_event: Callable[[str], Any] | None = None,
        read_only: bool = False,
        required: bool = True,
        processes: Processes | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint must be kept.")
        self._directory = folders.absolute(directory)
        self._keep = keep
        self._asynchronous = asynchronous
        self._on_event = on_event or _logger.warning
        self._read_only = read_only
        self._required = required
        self._processes = processes or SingleProcess()
        self._copies: dict[str, np.ndarray | jax.Array] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._running: tuple[int, Future[None]] | None = None
        self._failure: CheckpointError | None = None
        self._saves = self._failures = 0  # calls of `save`; failures in a row
        if not read_only:
            folders.make_directory(self._directory)

    def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Saves a checkpoint; the state may be donated as soon as this returns.

        A failing write (a full disk) after the first save does not stop the training: `on_event`
        hears of the first failure in a row, earlier checkpoints stay, and the next `save` tries
        anew. `wait` and `close` raise if the last save failed, as does `save` itself with
        `asynchronous=False`.

        Args:
            step: the step that the state has reached; above that of every checkpoint there is.
            state: any pytree of jax or NumPy arrays; typed PRNG keys are arrays too.
            meta: anything that JSON holds (tuples become lists): config, data position, progress.

        Raises:
            TypeError: a leaf of the state is not an array (it is named), or `meta` is not JSON.
            ValueError: `step` is not above the latest, a leaf has been donated, or `processes` is
                missing where there are several.
            CheckpointError: the save failed and was waited for; or `read_only`.
        """
        if self._read_only:
            raise CheckpointError(f"step={step}: this Checkpointer was opened with read_only=True.")
        self._check_processes(state)
        # Joined first: were the save before this one to fail, its step would be free again.
        self._join()
        step = int(step)
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step={step}: {str(self._directory)!r} has a checkpoint of step {latest} already; "
                "the steps saved must increase (see latest_step())."
            )
        plain = format.plain_json(meta or {})
        arrays, records = host_copy(state, self._copies, self._processes.is_leader)
        self._copies = arrays
        self._failure = None
        # A thread even if not asynchronous: under a running event loop (a notebook) Orbax patches
        # asyncio, or gives up.
        self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saves += 1
        running = self._worker.submit(self._write, step, arrays, records, plain)
        self._running = step, running
        if not self._asynchronous or (self._required and self._saves == 1):
            self.wait()

    def _check_processes(self, tree: Any) -> None:
        if self._processes.count == 1 and any(map(is_spread, jax.tree_util.tree_leaves(tree))):
            raise ValueError(
                "processes=None: the state has shards in other processes; give what they talk "
                "through (bilevel_flax.train.multihost.Channel)."
            )

    def _write(
        self,
        step: int,
        arrays: dict[str, np.ndarray | jax.Array],
        records: dict[str, Record],
        meta: dict[str, Any],
    ) -> None:
        try:
            with format.quiet_orbax():
                collective.write(
                    self._directory, step, arrays, records, meta, self._keep, self._processes
                )
        except Exception as error:
            text = f"The checkpoint of step {step} was not saved: {reason(error)}."
            # The disk has failed, and that is being reported; the next save cleans up.
            with contextlib.suppress(OSError):
                if folders.list_steps(self._directory):
                    text += f" Earlier ones in {str(self._directory)!r} are untouched."
                if self._processes.is_leader:
                    folders.discard(self._directory)
            self._failures += 1
            self._failure = CheckpointError(text)
            if self._failures == 1 and not (self._required and self._saves == 1):
                self._on_event(str(self._failure))
        else:
            if self._failures:
                self._on_event(f"The checkpoint of step {step} was saved, after failures.")
            self._failures = 0

    def restore(self, template: Any, step: int | None = None) -> Restored | None:
        """Restores the newest sound checkpoint, falling back over damaged ones.

        Every leaf is verified against its checksum. A damaged checkpoint is reported through
        `on_event` with its step and the reason, and moved to `damaged/` once a sound one is found.

        Args:
            template: a state of the same structure, of arrays or `jax.ShapeDtypeStruct`; it gives
                structure, dtypes and shardings, its values do not matter.
            step: only this step, without falling back.

        Returns:
            State, metadata and step; None if there is no checkpoint at all.

        Raises:
            CheckpointMismatch: it is another model's checkpoint; the first differing leaf is named.
            CheckpointError: there are checkpoints, but none is sound; or `step` is not there.
            TypeError: a leaf of the template is not an array.
        """
        self._check_processes(template)
        return self._restore(Template(template), step)

    def restore_parts(self, parts: Mapping[str, Any], step: int | None = None) -> Restored | None:
        """As `restore`, but only some fields of the state (see `checkpoints.restore_parts`)."""
        return self._restore(Template(parts, in_parts=True), step)

    def _restore(self, template: Template, step: int | None) -> Restored | None:
        def read(path: epath.Path, at: int) -> Restored:
            values, meta = collective.read(path, at, template, self._processes)
            return Restored(template.fill(values), meta, at)

        return self._search(read, step, self._processes, move_aside=not self._read_only)

    def read_meta(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Step and metadata of the newest checkpoint whose metadata are sound; None without any.

        The state is neither read nor verified: for the decision whether to resume, before a model
        is built. With `step` only that one is looked at.

        Raises:
            CheckpointError: there are checkpoints, but none has sound metadata.
        """

        def read(path: epath.Path, at: int) -> tuple[int, dict[str, Any]]:
            return at, format.read_document(path, at).meta

        return self._search(read, step, None, move_aside=False)

    def _search(
        self,
        read: Callable[[epath.Path, int], _T],
        only: int | None,
        processes: Processes | None,
        move_aside: bool,
    ) -> _T | None:
        self._join()
        result, damaged = folders.newest_sound(self._directory, read, only, processes)
        for step, why in damaged.items():
            fate = "It was passed over."
            if move_aside:
                leads = self._processes.is_leader
                fate = folders.move_aside(self._directory, step) if leads else ""
                fate = processes.broadcast(fate) if processes is not None else fate
            self._on_event(f"The checkpoint of step {step} is damaged: {why}. {fate}")
        return result

    def latest_step(self) -> int | None:
        """The newest step, that of a save still running included; None without any."""
        steps = folders.list_steps(self._directory)
        if self._running is not None and self.is_saving():
            steps.append(self._running[0])
        return max(steps, default=None)

    def is_saving(self) -> bool:
        """Whether a save is still running."""
        return self._running is not None and not self._running[1].done()

    def wait(self) -> None:
        """Waits for a running save.

        Raises:
            CheckpointError: the last save failed (raised once).
        """
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _join(self) -> None:
        if self._running is not None:
            self._running[1].result()
            self._running = None

    def close(self) -> None:
        """Waits for a running save and releases threads; using it afterwards opens it anew.

        Raises:
            CheckpointError: the last save failed, and `wait` has not raised it.
        """
        self._join()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self._copies = {}
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            self.close()
        except CheckpointError:
            # Already reported; it must not hide the error that is on its way.
            if error is None:
                raise
