"""One checkpoint, written and read by all processes at once; with one process, by that one.

Every process handles its own shards. What they must agree on goes through `Processes`: the folder
is made before anyone writes, the checksums are sums over processes, the checkpoint appears under
its name when all have written, and it is damaged for all of them or for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bilevel_flax.checkpoints import directory, format, shards
from bilevel_flax.checkpoints.checksum import as_checksum
from bilevel_flax.checkpoints.errors import Damaged
from bilevel_flax.checkpoints.processes import Processes, run_on_all, run_on_leader
from bilevel_flax.checkpoints.records import Record
from bilevel_flax.checkpoints.template import Template

if TYPE_CHECKING:
    from etils import epath


def write(
    folder: epath.Path,
    step: int,
    arrays: Mapping[str, np.ndarray | jax.Array],
    without_checksums: Mapping[str, Record],
    meta: Mapping[str, Any],
    keep: int,
    processes: Processes,
) -> None:
    """Writes a checkpoint and deletes the oldest ones.

    `arrays` are those that this process writes, all of them or its shards (`shards.host_copy`).

    Raises:
        Exception: whatever went wrong; then no process has a checkpoint.
    """
    path = folder / f"{step}{format.TEMPORARY}"
    names = [name for name, record in without_checksums.items() if 0 not in record.shape]

    def write_own() -> tuple[None, dict[str, int]]:
        format.write_arrays(path, arrays)
        return None, shards.own_sums(arrays)

    def complete() -> None:
        format.finish(path, step, complete_records, meta)
        directory.commit(path, step, keep)

    run_on_leader(processes, lambda: directory.prepare(path, format.item_names(names)))
    _, parts = run_on_all(processes, write_own)
    complete_records = {
        name: record._replace(checksum=as_checksum(sum(part.get(name, 0) for part in parts)))
        for name, record in without_checksums.items()
    }
    run_on_leader(processes, complete)


def read(
    path: epath.Path, step: int, template: Template, processes: Processes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies a checkpoint: its leaves by name, and the user's metadata.

    Raises:
        Damaged: it cannot be read, or is not what was written, for at least one process.
        CheckpointMismatch: it is another model's; the first differing leaf is named.
    """
    spread = {n: leaf.sharding for n, leaf in template.leaves.items() if shards.is_spread(leaf)}

    def read_own():
        document = format.read_document(path, step)
        if processes.is_leader:
            format.check_files(path, document)
        leaves = template.match(document.leaves, str(path))
        arrays = format.read_arrays(path, document, leaves, spread)
        sums = shards.own_sums(arrays)
        return (document, leaves, arrays, sums), {name: sums[name] for name in spread}

    (document, leaves, arrays, sums), others = run_on_all(processes, read_own)
    sums |= {name: sum(other[name] for other in others) for name in spread}

    def verify() -> tuple[None, None]:
        for name, array in arrays.items():
            record = document.leaves[name]
            if (array.dtype.name, array.shape) != (record.dtype, record.shape):
                actual = Record(array.dtype.name, array.shape, record.impl)
                raise Damaged(f"leaf {name!r} was saved as {record} and reads as {actual}")
            if as_checksum(sums[name]) != record.checksum:
                raise Damaged(f"leaf {name!r} has changed on disk (its checksum differs)")
        return None, None

    run_on_all(processes, verify)
    values = {
        name: shards.rebuild(leaf, arrays[name], document.leaves[name].impl)
        for name, leaf in leaves.items()
    }
    return values, document.meta
