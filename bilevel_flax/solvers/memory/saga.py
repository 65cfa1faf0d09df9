"""SAGA's memory of a finite sum of N components: each one's last value, and their mean.

    estimate = new - table[i] + mean        mean += (new - table[i]) / N        table[i] = new

The mean is a compensated sum (Kahan): a float32 mean that is only ever added to would drift, for
each addition below half a unit in its last place is lost.

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

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from bilevel_flax.base import PyTree, Table
from bilevel_flax.per_sample import is_rows
from bilevel_flax.solvers.memory import tables
from bilevel_flax.solvers.memory.averages import wide
from bilevel_flax.tree import is_inexact


@struct.dataclass
class SAGAState:
    """The memory of N components; integer leaves and `Rows` have no part in it (None).

    A table may hold a component's code instead, from which a linear `decode` makes it; the mean
    is always that of the components.

    Attributes:
        table: leaves [N, *leaf.shape], in the leaf's dtype or the one that was asked for; the row
            of `pending_id` is stale.
        mean: the mean over the components (the pending row included), in float32 at least.
        lost: what rounding has kept out of `mean`, to be added with the next change.
        pending: leaves [*leaf.shape], in the table's dtype: the row of the last visit.
        pending_id: int32 scalar, where it belongs.
    """

    table: Table
    mean: PyTree
    lost: PyTree
    pending: PyTree
    pending_id: jax.Array


def storable(tree: PyTree) -> PyTree:
    """The tree with None for integer leaves and for `Rows`."""

    def keep(node):
        return node if not is_rows(node) and is_inexact(node) else None

    return jax.tree.map(keep, tree, is_leaf=is_rows)


def empty(
    stored: PyTree,
    components: PyTree,
    num_batches: int,
    dtype: Any = None,
    *,
    memory: str = tables.DEVICE,
    traced: bool = True,
) -> SAGAState:
    """A memory of zeros.

    Args:
        stored: a tree of the shapes and dtypes of what is stored for each component.
        components: a tree of the components' shapes and dtypes, `stored` unless they are coded.
        num_batches: N.
        dtype: dtype of the table's rows; None: each leaf's own.
        memory: where the table lies, as in `tables.zeros`.
        traced: whether this is part of a jitted function.
    """

    def rows(leaf):
        return tables.zeros((num_batches, *leaf.shape), dtype or leaf.dtype, memory, traced)

    def zero_mean():
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf)), components)

    return SAGAState(
        table=Table(jax.tree.map(rows, stored)),
        mean=zero_mean(),
        lost=zero_mean(),
        pending=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype or leaf.dtype), stored),
        pending_id=jnp.int32(0),
    )


def visit(
    memory: SAGAState,
    position: jax.Array,
    new: PyTree,
    decode: Callable[[PyTree], PyTree] = lambda stored: stored,
) -> tuple[PyTree, SAGAState]:
    """Replaces component `position` by `new`.

    Args:
        memory: the memory.
        position: int32 scalar in [0, N); outside, the estimate is NaN (which stops the run).
        new: what is stored for the component, now; a tree as the table.
        decode: makes the component out of what is stored; linear.

    Returns:
        `(estimate, memory)`, the estimate in the dtypes of `memory.mean`.

    Raises:
        ValueError: `new` has other shapes than the table's rows.
    """
    leaves = jax.tree.leaves(memory.table)
    if not leaves:
        return new, memory
    for value, rows in zip(jax.tree.leaves(new), leaves, strict=True):
        if value.shape != rows.shape[1:]:
            raise ValueError(
                f"a minibatch gives {value.shape} to memorise, but the table's rows are "
                f"{rows.shape[1:]}: example_batch must have the shapes of the minibatches"
            )
    num_batches = leaves[0].shape[0]
    position = jnp.asarray(position, jnp.int32)  # N need not fit into the id's own integers
    inside = (position >= 0) & (position < num_batches)
    table = jax.tree.map(
        lambda rows, row: tables.write_row(rows, row, memory.pending_id),
        memory.table.rows,
        memory.pending,
    )

    def read(rows, value):
        row = tables.read_row(rows, position).astype(wide(value))
        return jnp.where(inside, row, jnp.nan)

    def change(values):
        moved = jax.tree.map(lambda value, row: value.astype(row.dtype) - row, values, old)
        return decode(moved)

    old = jax.tree.map(read, table, new)
    stored = jax.tree.map(lambda value, rows: value.astype(rows.dtype), new, table)
    estimate = jax.tree.map(
        lambda part, mean: part.astype(mean.dtype) + mean, change(new), memory.mean
    )
    # The mean follows what the table holds, so that rounding to its dtype leaves no bias.
    increment = jax.tree.map(
        lambda part, lost: part.astype(lost.dtype) / num_batches + lost, change(stored), memory.lost
    )
    mean = jax.tree.map(jnp.add, memory.mean, increment)
    lost = jax.tree.map(lambda new, old, more: more - (new - old), mean, memory.mean, increment)
    return estimate, SAGAState(Table(table), mean, lost, stored, position)


def visit_rows(memory: PyTree, cross: PyTree, num_batches: int) -> tuple[PyTree, PyTree]:
    """SAGA for rows that live in one component each -> (dense estimate, memory)."""

    def replace(last, node):
        if last is None:
            return None
        # Cleared and added to, not set: examples may be repeated within a minibatch.
        cleared = last.at[node.index].set(0, mode="drop")
        return cleared.at[node.index].add(node.values.astype(last.dtype), mode="drop")

    fresh = jax.tree.map(replace, memory, cross, is_leaf=lambda node: node is None)
    estimate = jax.tree.map(lambda new, last: (new - last) + last / num_batches, fresh, memory)
    return estimate, fresh
