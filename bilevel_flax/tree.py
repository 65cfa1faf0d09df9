"""Pytrees: which leaves are differentiated (floats are, integers and keys are not), norms, sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from bilevel_flax.base import PyTree


class Split(NamedTuple):
    """A tree's differentiable leaves, and the way back."""

    leaves: list[jax.Array]
    merge: Callable[[list[jax.Array]], PyTree]  # the other leaves as they were
    complete: Callable[[list[jax.Array]], PyTree]  # the other leaves as zeros


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is differentiated: floats are, integers and PRNG keys are not."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split(tree: PyTree) -> Split:
    """The float leaves of a tree, and the two ways to put others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def rebuild(new, others):
        out = list(others)
        for i, leaf in zip(chosen, new, strict=True):
            out[i] = leaf
        return treedef.unflatten(out)

    def complete(new):
        return rebuild(new, [None if is_inexact(x) else jnp.zeros_like(x) for x in leaves])

    return Split([leaves[i] for i in chosen], lambda new: rebuild(new, leaves), complete)


def uses(function: Callable, *args: Any) -> list[bool]:
    """For each leaf of the arguments, whether the function's result can depend on it."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(used)


def norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over the float leaves, in float32 at least; not finite iff a leaf is not.

    A finite direction whose square overflows float32 counts as infinite.
    """
    # A dot product, not sum(square(...)): XLA's CPU reductions are scalar loops, 5 times slower.
    flat = [
        leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)).reshape(-1)
        for leaf in jax.tree.leaves(tree)
        if is_inexact(leaf)
    ]
    squares = [jnp.vdot(leaf, leaf) for leaf in flat]
    return jnp.sqrt(sum(squares, start=jnp.float32(0.0)))


def ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """Top / bottom; 0/0 is 0."""
    return jnp.where(
        bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), jnp.where(top > 0, jnp.inf, 0.0)
    )


def rows_at(leaf: jax.Array, index: Any) -> jax.Array:
    """`leaf[index]`, NaN where the index is outside [0, n): never the row of another.

    Args:
        leaf: float [n, ...].
        index: integers, any shape.

    Returns:
        [*index.shape, ...].

    Example:
        >>> rows_at(jnp.array([5.0, 6.0]), jnp.array([1, 2, -1])).tolist()
        [6.0, nan, nan]
    """
    index = jnp.asarray(index)
    # n, which stands for "no row", may not fit into a narrow integer.
    index = index.astype(jnp.promote_types(index.dtype, jnp.int32))
    inside = jnp.where((index >= 0) & (index < leaf.shape[0]), index, leaf.shape[0])
    return leaf.at[inside].get(mode="fill", fill_value=jnp.nan)
