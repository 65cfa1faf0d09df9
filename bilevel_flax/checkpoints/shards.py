"""A state's leaves on their way into a checkpoint and back, wherever their shards live.

A leaf whose values differ from process to process is *spread*: it stays in pieces, each process
copies, sums, writes and reads its own, and nobody holds the whole. Any other leaf is one array in
host memory, which the leader writes.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.checkpoints import records
from bilevel_flax.checkpoints.checksum import piece_sum
from bilevel_flax.checkpoints.records import Record

_PIECE = 16 * 2**20  # bytes that one thread copies at a time


def is_spread(leaf: Any) -> bool:
    """Whether no process has all of the leaf (an array, or a template of one)."""
    sharding = getattr(leaf, "sharding", None)
    return (
        sharding is not None
        and not sharding.is_fully_addressable
        and not sharding.is_fully_replicated
    )


def host_copy(
    tree: Any, spare: Mapping[str, np.ndarray | jax.Array] | None = None, is_leader: bool = True
) -> tuple[dict[str, np.ndarray | jax.Array], dict[str, Record]]:
    """Copies every leaf into host memory of its own.

    The copies never share memory with a leaf: a NumPy view of a jax array on a CPU keeps the buffer
    referenced and so silently cancels its donation.

    Args:
        tree: any pytree of jax or NumPy arrays, typed PRNG keys included.
        spare: copies of before, whose memory is used again where it fits. Fresh memory takes three
            times as long: the system clears it first.
        is_leader: whether this is the process that writes what is not spread.

    Returns:
        Arrays by leaf name, of the leaves that this process writes (NumPy's, key data for a typed
        PRNG key; a jax array in host memory for a spread leaf); records without checksum, of all.

    Raises:
        TypeError: a leaf is not an array (Python scalars and strings included).
        ValueError: a leaf has been donated.
    """
    leaves, described = records.named_leaves(tree), {}
    for name, leaf in leaves.items():
        described[name] = records.describe(name, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"state: leaf {name!r} is a jax.ShapeDtypeStruct; save arrays.")
        if not isinstance(leaf, jax.Array):
            continue
        if leaf.is_deleted():
            raise ValueError(
                f"state: leaf {name!r} has been donated or deleted; save the state that the step "
                "returned."
            )
        if described[name].impl:
            leaf = leaves[name] = jax.random.key_data(leaf)
        if next(iter(leaf.devices())).platform != "cpu" and not is_spread(leaf):
            leaf.copy_to_host_async()  # All transfers run at once; _own_copy collects them.
    spare = spare or {}
    copies, pending = {}, []
    for name, leaf in leaves.items():
        if is_spread(leaf):
            copies[name] = _spread_copy(leaf)
        elif is_leader:
            copies[name] = _own_copy(leaf, spare.get(name), pending)
    _copy(pending)
    jax.block_until_ready([copy for copy in copies.values() if isinstance(copy, jax.Array)])
    return copies, described


def _own_copy(
    leaf: Any, spare: np.ndarray | jax.Array | None, pending: list[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    values = np.asarray(leaf)
    native = values.dtype.newbyteorder("=")
    copy = np.empty(0) if spare is None or isinstance(spare, jax.Array) else spare
    if (copy.shape, copy.dtype) != (values.shape, native):
        copy = np.empty(values.shape, native)
    pending.append((copy, values))
    return copy


def _copy(pending: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copies each second array into the first, large ones in pieces and by several threads."""
    pieces = []
    for to, source in pending:
        rows = max(1, len(to) * _PIECE // to.nbytes) if to.ndim and to.nbytes > _PIECE else 0
        if rows:
            starts = range(0, len(to), rows)
            pieces += [(to[i : i + rows], source[i : i + rows]) for i in starts]
        else:
            np.copyto(to, source)
    if pieces:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda piece: np.copyto(*piece), pieces))


def _spread_copy(leaf: jax.Array) -> jax.Array:
    """The same array in the host's memory, sharded alike: nothing crosses a network."""
    kind = "pinned_host"
    copies = [
        jax.device_put(
            shard.data, jax.sharding.SingleDeviceSharding(shard.device, memory_kind=kind)
        )
        for shard in leaf.addressable_shards
    ]
    sharding = leaf.sharding.with_memory_kind(kind)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)


def own_sums(arrays: Mapping[str, np.ndarray | jax.Array]) -> dict[str, int]:
    """What this process contributes to every checksum; the sum over processes is the checksum.

    Of a piece that several devices hold, only the first one counts.
    """
    sums = {}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            sums[name] = piece_sum(array, (0,) * array.ndim, array.shape)
            continue
        sums[name] = sum(
            piece_sum(np.asarray(shard.data), tuple(s.start or 0 for s in shard.index), array.shape)
            for shard in array.addressable_shards
            if shard.replica_id == 0
        )
    return sums


def rebuild(leaf: Any, array: np.ndarray | jax.Array, impl: str) -> Any:
    """A leaf of the template's kind (jax or NumPy) and sharding, with the stored values.

    A jax array has no weak type, memory of its own (safe to donate), and is committed to devices
    only if the template's leaf is: a jitted function retraces otherwise. `array` is in host memory,
    or already sharded as the leaf is; `impl` is a typed PRNG key's implementation, else empty.
    """
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow != array.dtype:
        raise ValueError(
            f"template: {array.dtype} became {narrow}; set jax_enable_x64 as at the save."
        )
    placed = leaf.sharding if getattr(leaf, "committed", True) else None
    # copy=True: on a CPU jax may otherwise adopt NumPy's buffer, which it can never donate.
    if isinstance(array, jax.Array):
        pieces = [jnp.array(shard.data, copy=True) for shard in array.addressable_shards]
        value = jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)
    elif placed is not None and len(placed.device_set) > 1:
        # Piece by piece: the whole need not fit on one device.
        value = jax.make_array_from_callback(
            array.shape, placed, lambda index: np.array(array[index], copy=True)
        )
        pieces = [jnp.array(shard.data, copy=True) for shard in value.addressable_shards]
        value = jax.make_array_from_single_device_arrays(array.shape, placed, pieces)
    else:
        value = jnp.array(array, copy=True)
    if impl:
        value = jax.random.wrap_key_data(value, impl=impl)
    if placed is not None and value.sharding != placed and not isinstance(array, jax.Array):
        value = jax.device_put(value, placed)
    return value
