"""SAGA's memory of a finite sum of N components: each one's last value, and their mean.

    estimate = new - table[i] + mean        mean += (new - table[i]) / N        table[i] = new

The estimate's expectation over a uniform i is the full mean, whatever the table holds.

A step that reads a row of a table and then writes it copies the WHOLE table on CPU, donated or
not: the read must see the old rows, so XLA keeps them. Here the write is delayed by one visit: a
visit first writes the row of the visit before (`pending`), then reads its own. The iterates are
the same, the table is updated in place, and a visit costs O(row), not O(table).

Only finite rows reach a table. A row is written one step after it was made, and a step whose
directions are not finite keeps the previous `pending` (the loop freezes everything but tables),
so the write is repeated with the same values.

References:
    A. Defazio, F. Bach, S. Lacoste-Julien. SAGA: a fast incremental gradient method with support
    for non-strongly convex composite objectives. NeurIPS 2014.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.core import Tracer

from bilevel_flax.base import PyTree, Table
from bilevel_flax.oracles import is_inexact
from bilevel_flax.rows import is_rows
from bilevel_flax.solvers.running import wide

_log = logging.getLogger(__name__)


@struct.dataclass
class Memory:
    """The memory of N components; integer leaves and `Rows` have no part in it (None).

    Attributes:
        table: leaves [N, *leaf.shape], in the leaf's dtype or the one that was asked for; the row
            of `pending_id` is stale.
        mean: leaves [*leaf.shape], the mean over the components (the pending row included), in
            float32 at least.
        pending: leaves [*leaf.shape], in the table's dtype: the row of the last visit.
        pending_id: int32 scalar, where it belongs.
    """

    table: Table
    mean: PyTree
    pending: PyTree
    pending_id: jax.Array


def storable(tree: PyTree) -> PyTree:
    """The tree with None for integer leaves and for `Rows`."""

    def keep(node):
        return node if not is_rows(node) and is_inexact(node) else None

    return jax.tree.map(keep, tree, is_leaf=is_rows)


def empty(like: PyTree, num_batches: int, dtype: Any = None) -> Memory:
    """A memory of zeros.

    Args:
        like: a tree of the components' shapes and dtypes.
        num_batches: N.
        dtype: dtype of the table's rows; None: each leaf's own.
    """

    def zeros(leading):
        return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), dtype or x.dtype), like)

    return Memory(
        table=Table(zeros((num_batches,))),
        mean=jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), like),
        pending=zeros(()),
        pending_id=jnp.int32(0),
    )


def visit(memory: Memory, position: jax.Array, new: PyTree) -> tuple[PyTree, Memory]:
    """Replaces component `position` by `new`.

    Args:
        memory: the memory.
        position: int32 scalar in [0, N); outside, the estimate is NaN (which stops the run).
        new: the component's value now, a tree as `memory.mean`.

    Returns:
        `(estimate, memory)`, the estimate in the dtypes of `memory.mean`.
    """
    leaves = jax.tree.leaves(memory.table)
    if not leaves:
        return new, memory
    num_batches = leaves[0].shape[0]
    inside = (position >= 0) & (position < num_batches)
    table = jax.tree.map(
        lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, memory.pending_id, 0),
        memory.table.rows,
        memory.pending,
    )

    def read(rows, mean):
        row = lax.dynamic_index_in_dim(rows, position, 0, keepdims=False)
        return jnp.where(inside, row.astype(mean.dtype), jnp.nan)

    old = jax.tree.map(read, table, memory.mean)
    stored = jax.tree.map(lambda value, rows: value.astype(rows.dtype), new, table)
    estimate = jax.tree.map(
        lambda value, row, mean: value.astype(mean.dtype) - row + mean, new, old, memory.mean
    )
    # The mean follows what the table holds, so that rounding to its dtype leaves no bias.
    mean = jax.tree.map(
        lambda mean, value, row: mean + (value.astype(mean.dtype) - row) / num_batches,
        memory.mean,
        stored,
        old,
    )
    return estimate, Memory(Table(table), mean, stored, jnp.asarray(position, jnp.int32))


def settled(memory: Memory) -> PyTree:
    """The N components with the pending row in place, leaves [N, *leaf.shape] (a copy)."""
    return jax.tree.map(
        lambda rows, row: rows.at[memory.pending_id].set(row), memory.table.rows, memory.pending
    )


def check_size(memories: dict[str, Memory], max_bytes: int | None, like: PyTree) -> None:
    """Logs the size of tables and refuses what does not fit; before they are made.

    Args:
        memories: by name; shapes suffice (`jax.eval_shape`).
        max_bytes: the limit; None: the memory of JAX's local devices (the machine's on CPU),
            which is not applied while tracing, as the state may then be for other devices.
        like: arrays that tell whether this is being traced.

    Raises:
        ValueError: the size, the limit, and the ways out.
    """
    sizes = {name: _num_bytes(memory) for name, memory in memories.items()}
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {_in_words(size)}" for name, size in sizes.items())
    _log.info("tables take %s (%s)", _in_words(total), parts)
    limit = max_bytes
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(like))
    if limit is None and not traced:
        limit = _capacity()
    if limit is not None and total > limit:
        given = "max_table_bytes" if max_bytes is not None else "the memory at hand"
        raise ValueError(
            f"the tables take {_in_words(total)} and {given} is {_in_words(limit)}: store them in "
            "half the space (table_dtype=jnp.bfloat16), cut the data into fewer, larger "
            "minibatches, or take bf.srba, which keeps no table"
        )


def _num_bytes(memory: Memory) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory.table))


def _in_words(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"


def _capacity() -> int | None:
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    stats = devices[0].memory_stats() or {}
    return stats["bytes_limit"] * len(devices) if "bytes_limit" in stats else None
