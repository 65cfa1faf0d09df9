"""Directions that an estimator carries from step to step: averages and sums of oracle calls.

They are kept in float32 at least. Two kinds of leaves are not carried but handed on as the
minibatch gave them: integer leaves, and `Rows` for a row-sparse optimiser ("lazy"): each such row
lives in one minibatch, so its value is exact at the moment of the visit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import PyTree, Variables
from bilevel_flax.tree import is_inexact
from bilevel_flax.tree import wide as wide_dtype


def wide(leaf: jax.Array) -> Any:
    """The dtype of running means and sums: float32, or the leaf's if that is wider."""
    return wide_dtype(leaf.dtype)


def widened(tree: PyTree) -> PyTree:
    """The float leaves in the dtype of running means."""
    return jax.tree.map(lambda leaf: leaf.astype(wide(leaf)) if is_inexact(leaf) else leaf, tree)


def _is_none(node: Any) -> bool:
    return node is None


def full_like(tree: PyTree, value: float, per_sample: PyTree = None, lazy: bool = False) -> PyTree:
    """Constant leaves of the tree's shapes; None where nothing is carried.

    Args:
        tree: z, v or x.
        value: the constant.
        per_sample: `Problem.per_sample` if the tree is x.
        lazy: whether the optimiser takes `Rows` as they are.
    """

    def constant(leaf):
        return jnp.full(leaf.shape, value, wide(leaf)) if is_inexact(leaf) else None

    on_rows = (lambda _: None) if lazy else constant
    return rows.map_prefix(per_sample, on_rows, constant, tree)


def start(variables: Variables, value: float, per_sample: PyTree, lazy: bool) -> Variables:
    """Running directions for all three variables, each entry `value`."""
    z, v, x = variables
    return Variables(
        full_like(z, value), full_like(v, value), full_like(x, value, per_sample, lazy)
    )


def accumulate(running: PyTree, decay: Any, increment: PyTree, weight: Any = 1.0) -> PyTree:
    """Decay · running + weight · increment; `Rows` are scattered, None adds nothing."""

    def weighted(term, total):
        return term.astype(total.dtype) * jnp.asarray(weight, total.dtype)

    def leafwise(total, term):
        if total is None:
            return None
        total = total * jnp.asarray(decay, total.dtype)
        if term is None:
            return total
        if rows.is_rows(term):
            return total.at[term.index].add(weighted(term.values, total), mode="drop")
        return total + weighted(term, total)

    return jax.tree.map(leafwise, running, increment, is_leaf=_is_none)


def in_dtypes_of(params: PyTree, direction: PyTree) -> PyTree:
    """A direction's floats in the dtypes of the parameters, so that no optimiser state changes."""

    def cast(node, leaf):
        if rows.is_rows(node):
            return node._replace(values=node.values.astype(leaf.dtype))
        return node.astype(leaf.dtype) if is_inexact(node) else node

    return jax.tree.map(cast, direction, params, is_leaf=rows.is_rows)


def cast_like(running: PyTree, current: PyTree) -> PyTree:
    """What the optimiser gets: the running direction, the minibatch's where none is carried.

    The dtypes are those of `current`, so that no optimiser state changes its own.
    """

    def leafwise(total, node):
        if total is None:
            return node
        return total.astype(node.values.dtype if rows.is_rows(node) else node.dtype)

    return jax.tree.map(leafwise, running, current, is_leaf=_is_none)
