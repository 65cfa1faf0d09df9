"""Per-sample leaves of x: gather the minibatch's rows, scatter what was computed for them.

A leaf [n, ...] with one row for each training example is never differentiated as a whole: the
step gathers `leaf[batch["index"]]`, differentiates the rows, and hands on `Rows(index, values)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import PyTree, Rows, Table
from bilevel_flax.minibatches import example_mask, integers, name_of
from bilevel_flax.tree import rows_at, wide_index


class RowTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that takes `Rows` leaves as they are (see `outer.lazy`).

    Its `init` is handed x with the per-sample leaves wrapped in `Table`, its `update` directions
    with `Rows` for them; it returns `Rows` with these or fewer indices. What it remembers by row
    belongs into a `Table`, written at these indices only. Any other transformation of x is handed
    dense leaves.
    """


def takes_rows(optimisers: Mapping[str, Any]) -> bool:
    """Whether `optimisers["outer"]` is row-sparse."""
    return isinstance(optimisers.get("outer"), RowTransformation)


def is_rows(node: Any) -> bool:
    """Whether a node of a direction is `Rows` (for `is_leaf=`)."""
    return isinstance(node, Rows)


def map_prefix(per_sample: PyTree, where_true: Callable, where_false: Callable, tree: PyTree):
    """Maps the leaves under True of the prefix `per_sample` one way and the rest another."""
    prefix = False if per_sample is None else per_sample
    try:
        flags = jax.tree.map(lambda flag, node: jax.tree.map(lambda _: flag, node), prefix, tree)
    except ValueError as error:
        raise ValueError(
            f"per_sample={per_sample!r} is not a pytree prefix of outer_params "
            f"({jax.tree.structure(tree)}): give booleans in the same nesting, "
            'e.g. {"weights": True, "penalty": False}'
        ) from error
    return jax.tree.map(lambda flag, leaf: (where_true if flag else where_false)(leaf), flags, tree)


def has_rows(per_sample: PyTree) -> bool:
    """Whether any leaf is declared to be per-sample."""
    return any(jax.tree.leaves(per_sample))


def _minibatch_index(batch: PyTree) -> jax.Array:
    index = integers(
        batch,
        "index",
        "per-sample outer parameters",
        ": each example's position in the training set, which `bilevel_flax.data.partition` adds",
    )
    others = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)[0]
        for path, leaf in jax.tree.leaves_with_path(batch)
        if jnp.ndim(leaf) and name_of(path) != "index"
    }
    if index.ndim != 1 or (others and len(index) not in others.values()):
        raise ValueError(
            f'batch["index"] has shape {index.shape}, but must be [batch], one position for each '
            f"example; the other entries' leading axes are {others}"
        )
    return wide_index(index)


def gather(per_sample: PyTree, outer_params: PyTree, batch: PyTree) -> PyTree:
    """X with each per-sample leaf [n, ...] replaced by the minibatch's rows [batch, ...].

    Rows of padding (`minibatches.example_mask`) are those of example 0. An index outside [0, n) of
    a real example gives NaN, which stops the run, never another example's row.

    Raises:
        ValueError: `batch["index"]` is missing.
        TypeError: `batch["index"]` is not an array of integers.
    """
    if not has_rows(per_sample):
        return outer_params
    index, mask = _minibatch_index(batch), example_mask(batch)
    if mask is not None:
        index = jnp.where(mask > 0, index, 0)
    return map_prefix(
        per_sample, lambda leaf: rows_at(leaf, index), lambda leaf: leaf, outer_params
    )


def wrap(per_sample: PyTree, row_values: PyTree, outer_params: PyTree, batch: PyTree) -> PyTree:
    """Labels the values computed for gathered rows with their index, as `Rows`."""
    if not has_rows(per_sample):
        return row_values
    index, mask = _minibatch_index(batch), example_mask(batch)
    flags = map_prefix(per_sample, lambda _: True, lambda _: False, outer_params)

    def label(flag, values, leaf):
        if not flag:
            return values
        real = (index >= 0) & (index < leaf.shape[0])
        if mask is not None:
            real &= mask > 0
        return Rows(jnp.where(real, index, leaf.shape[0]).astype(jnp.int32), values)

    return jax.tree.map(label, flags, row_values, outer_params)


def marked(per_sample: PyTree, outer_params: PyTree) -> PyTree:
    """X with its per-sample leaves wrapped in `Table`: what a row-sparse optimiser's init sees."""
    return map_prefix(per_sample, Table, lambda leaf: leaf, outer_params)


def densify(direction: PyTree, outer_params: PyTree) -> PyTree:
    """Scatters each `Rows` of a direction into zeros of its leaf's shape [n, ...]."""

    def dense(node, leaf):
        if not is_rows(node):
            return node
        return jnp.zeros_like(leaf).at[node.index].add(node.values, mode="drop")

    return jax.tree.map(dense, direction, outer_params, is_leaf=is_rows)


def add(direction: PyTree, other: PyTree) -> PyTree:
    """Adds two directions of x; where the second has None (a per-sample leaf), the first stays."""
    return jax.tree.map(
        lambda node, term: node if term is None else node + term,
        direction,
        other,
        is_leaf=is_rows,
    )


def dense_leaves(tree: PyTree) -> list:
    """The leaves of a direction that are no `Rows`."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_rows) if not is_rows(node)]


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Params + updates in the dtypes of params; `Rows` touch their rows only, None leaves stay."""

    def apply(update, leaf):
        if update is None:
            return leaf
        if is_rows(update):
            return leaf.at[update.index].add(update.values.astype(leaf.dtype), mode="drop")
        return (leaf + update).astype(leaf.dtype)

    return jax.tree.map(apply, updates, params, is_leaf=lambda node: node is None or is_rows(node))
