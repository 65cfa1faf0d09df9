"""One checkpoint, written and read by all processes at once; with one process, by that one.

Every process handles its own shards. What they must agree on goes through `Processes`: the folder
is made before anyone writes, the checksums are sums over processes, the checkpoint appears under
its name when all have written, and it is damaged for all of them or for none.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from bilevel_flax.checkpoints import checksum as fingerprint
from bilevel_flax.checkpoints import directory as checkpoint_search
from bilevel_flax.checkpoints import format as checkpoint_format
from bilevel_flax.checkpoints import shards as checkpoint_leaves
from bilevel_flax.checkpoints.checksum import Record
from bilevel_flax.checkpoints.format import CheckpointMismatch, Damaged
from bilevel_flax.checkpoints.processes import Processes, run_on_all, run_on_leader


def write(
    directory: epath.Path,
    step: int,
    arrays: Mapping[str, np.ndarray | jax.Array],
    records: Mapping[str, Record],
    meta: Mapping[str, Any],
    keep: int,
    processes: Processes,
) -> None:
    """Writes a checkpoint and deletes the oldest ones.

    Args:
        directory: of all checkpoints.
        step: the step.
        arrays: this process's copies (`checkpoint_leaves.host_copy`).
        records: with or without checksums.
        meta: the user's metadata, plain JSON.
        keep: how many checkpoints to keep.
        processes: all of them.

    Raises:
        Exception: whatever went wrong; then no process has a checkpoint.
    """
    path = directory / f"{step}{checkpoint_format.TEMPORARY}"

    def write_own() -> tuple[None, dict[str, int]]:
        checkpoint_format.write_arrays(path, arrays)
        return None, checkpoint_leaves.own_sums(arrays, whole_count=processes.is_leader)

    def complete() -> None:
        checkpoint_format.finish(path, step, summed, meta)
        checkpoint_search.commit(path, step, keep)

    run_on_leader(processes, lambda: checkpoint_search.prepare(path))
    _, parts = run_on_all(processes, write_own)
    summed = {
        name: record._replace(checksum=fingerprint.as_checksum(sum(part[name] for part in parts)))
        for name, record in records.items()
    }
    run_on_leader(processes, complete)


class Wanted(NamedTuple):
    """What a reader expects to find.

    Attributes:
        leaves: the template's, by name.
        records: theirs, without checksums.
    """

    leaves: Mapping[str, Any]
    records: Mapping[str, Record]


def read(
    path: epath.Path, step: int, wanted: Wanted, processes: Processes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies a checkpoint.

    Args:
        path: the step's directory.
        step: the step that it should be.
        wanted: of a state, which says too where the values go.
        processes: all of them.

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
        sums = checkpoint_leaves.own_sums(arrays)
        return (meta, saved, arrays, sums), {name: sums[name] for name in spread}

    (meta, saved, arrays, sums), parts = run_on_all(processes, read_own)
    sums |= {name: sum(part[name] for part in parts) for name in spread}

    def verify():
        damage = checkpoint_format.first_damage(arrays, sums, saved)
        if damage is not None:
            raise Damaged(damage)
        return None, None

    run_on_all(processes, verify)
    leaves = {
        name: checkpoint_leaves.rebuild(leaf, arrays[name], saved[name].impl)
        for name, leaf in wanted.leaves.items()
    }
    return leaves, meta
