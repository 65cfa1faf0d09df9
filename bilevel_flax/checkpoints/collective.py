"""One checkpoint, written and read by all processes at once; with one process, by that one.

Every process handles its own shards. What they must agree on goes through a `Channel`: the folder
is made before anyone writes, the checksums are sums over processes, the checkpoint appears under
its name when all have written, and it is damaged for all of them or for none.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath

from bilevel_flax.checkpoints import checksum as fingerprint
from bilevel_flax.checkpoints import directory as checkpoint_search
from bilevel_flax.checkpoints import format as checkpoint_format
from bilevel_flax.checkpoints import shards as checkpoint_leaves
from bilevel_flax.checkpoints.checksum import Record
from bilevel_flax.checkpoints.format import CheckpointMismatch, Damaged
from bilevel_flax.train.multihost import Channel, PeerFailed

_T = TypeVar("_T")


def write(
    directory: epath.Path,
    step: int,
    arrays: Mapping[str, np.ndarray | jax.Array],
    records: Mapping[str, Record],
    meta: Mapping[str, Any],
    keep: int,
    channel: Channel,
) -> None:
    """Writes a checkpoint and deletes the oldest ones.

    Args:
        directory: of all checkpoints.
        step: the step.
        arrays: this process's copies (`checkpoint_leaves.host_copy`).
        records: with or without checksums.
        meta: the user's metadata, plain JSON.
        keep: how many checkpoints to keep.
        channel: of all processes.

    Raises:
        Exception: whatever went wrong here, or `PeerFailed`: then no process has a checkpoint.
    """
    path = directory / f"{step}{checkpoint_format.TEMPORARY}"

    def write_own() -> dict[str, int]:
        checkpoint_format.write_arrays(path, arrays)
        return checkpoint_leaves.own_sums(arrays)

    def complete() -> None:
        checkpoint_format.finish(path, step, summed, meta)
        checkpoint_search.commit(path, step, keep)

    channel.on_leader(lambda: checkpoint_search.prepare(path))
    parts = channel.together(write_own)
    summed = {
        name: record._replace(checksum=fingerprint.as_checksum(sum(part[name] for part in parts)))
        for name, record in records.items()
    }
    channel.on_leader(complete)


class Wanted(NamedTuple):
    """What a reader expects to find.

    Attributes:
        leaves: the template's, by name.
        records: theirs, without checksums.
    """

    leaves: Mapping[str, Any]
    records: Mapping[str, Record]


def read(
    path: epath.Path, step: int, wanted: Wanted, channel: Channel
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies a checkpoint.

    Args:
        path: the step's directory.
        step: the step that it should be.
        wanted: of a state, which says too where the values go.
        channel: of all processes.

    Returns:
        The leaves by name, like the template's; the user's metadata.

    Raises:
        Damaged: it cannot be read, or is not what was written, for at least one process.
        CheckpointMismatch: it is another model's; the first differing leaf is named.
    """
    spread = {
        name: leaf.sharding
        for name, leaf in wanted.leaves.items()
        if checkpoint_leaves.is_spread(leaf)
    }

    def read_own():
        meta, saved = checkpoint_format.read_document(path, step)
        mismatch = fingerprint.first_mismatch(saved, wanted.records)
        if mismatch is not None:
            raise CheckpointMismatch(f"{str(path)!r} is a checkpoint of another model: {mismatch}.")
        arrays = checkpoint_format.read_arrays(path, saved, spread)
        sums = checkpoint_leaves.own_sums(arrays, everywhere=True)
        return (meta, saved, arrays, sums), {name: sums[name] for name in spread}

    (meta, saved, arrays, sums), parts = _all_or_none(channel, read_own)
    sums |= {name: sum(part[name] for part in parts) for name in spread}

    def verify():
        damage = checkpoint_format.first_damage(arrays, sums, saved)
        if damage is not None:
            raise Damaged(damage)
        return None, None

    _all_or_none(channel, verify)
    leaves = {
        name: checkpoint_leaves.rebuild(leaf, arrays[name], saved[name].impl)
        for name, leaf in wanted.leaves.items()
    }
    return leaves, meta


def _all_or_none(channel: Channel, function: Callable[[], tuple[_T, Any]]) -> tuple[_T, list[Any]]:
    """Runs it on every process, with one verdict for all.

    Args:
        channel: of all processes.
        function: gives something to keep and something to tell (JSON).

    Returns:
        What was kept here, and what everyone told.

    Raises:
        Damaged: at least one process found damage, and nothing worse happened.
    """
    kept: Any = None
    told, kind, said = None, "", ""
    failure = None
    try:
        kept, told = function()
    except Exception as error:
        failure = error
        kind = "damaged" if isinstance(error, Damaged) else "failed"
        said = checkpoint_format.reason(error) if kind == "failed" else str(error)
    everyone = channel.exchange([kind, said, told])
    for worst in ("failed", "damaged"):
        for process, (theirs, why, _) in enumerate(everyone):
            if theirs == worst:
                if failure is not None and kind == worst:
                    raise failure
                raise (
                    Damaged(f"process {process}: {why}")
                    if worst == "damaged"
                    else PeerFailed(f"process {process}: {why}")
                )
    return kept, [other[2] for other in everyone]
