"""Pytrees: which leaves are differentiated (floats are, integers and keys are not), norms, sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from bilevel_flax.base import PyTree, Rows, Table

# FSDP keeps leaves below this whole (`sharding/rules.py`), so that putting them together moves
# nothing between devices; rules of one's own that cut them cost their bytes.
_SMALL = 2**10


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
        return rebuild(new, [None if is_inexact(x) else _zero(x) for x in leaves])

    return Split([leaves[i] for i in chosen], lambda new: rebuild(new, leaves), complete)


def _zero(leaf: Any) -> jax.Array:
    """Zeros for a leaf of a direction or of v; of integers where its own dtype cannot be added."""
    dtype = jnp.result_type(leaf)
    dtype = dtype if jnp.issubdtype(dtype, jnp.number) else jnp.int32  # no bool, no PRNG key
    if isinstance(leaf, jax.Array) and dtype == leaf.dtype:
        return jnp.zeros_like(leaf)  # where the leaf lies, however it is cut
    return jnp.zeros(jnp.shape(leaf), dtype)


def depends_on(function: Callable, *args: Any) -> list[bool]:
    """For each leaf of the arguments, whether the function's result can depend on it."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(used)


def filter_inexact(tree: PyTree) -> PyTree:
    """The tree with None for leaves that are not differentiated: what an optimiser is handed."""

    def keep(node):
        return node if isinstance(node, Rows) or is_inexact(node) else None

    return jax.tree.map(keep, tree, is_leaf=lambda node: isinstance(node, Rows))


def add(tree: PyTree, other: PyTree) -> PyTree:
    """Their sum on the float leaves; other leaves (integers, keys) are those of the first."""
    return jax.tree.map(lambda a, b: a + b if is_inexact(a) else a, tree, other)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros in the place of every leaf (or shape), int32 for bools and keys; `Rows` at no row."""

    def zeros(node):
        empty = jax.tree.map(_zero, node)
        return nowhere(empty) if isinstance(node, Rows) else empty

    return jax.tree.map(zeros, tree, is_leaf=lambda node: isinstance(node, Rows))


def nowhere(node: Rows) -> Rows:
    """The same values at no row: an index past every table's end is dropped."""
    return node._replace(index=jnp.full_like(node.index, jnp.iinfo(node.index.dtype).max))


def plus_decay(tree: PyTree, decay: PyTree, vector: PyTree) -> PyTree:
    """Tree + λ · vector with a number λ for each float leaf, None for others; None: the tree."""
    if decay is None:
        return tree
    is_none = lambda node: node is None
    add_to = lambda rate, leaf, v: leaf if rate is None else leaf + jnp.asarray(rate, v.dtype) * v
    return jax.tree.map(add_to, decay, tree, vector, is_leaf=is_none)


def wide(dtype: Any) -> Any:
    """The dtype of sums: float32, or the dtype itself if it is wider."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def wide_index(index: Any) -> jax.Array:
    """Integers of 32 bits at least: n, which stands for "no row", may not fit into narrower."""
    index = jnp.asarray(index)
    return index.astype(jnp.int32) if jnp.iinfo(index.dtype).bits < 32 else index


def norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over the float leaves, in float32 at least; not finite iff a leaf is not.

    A finite direction whose square overflows float32 counts as infinite.
    """
    # A dot product, not sum(square(...)): XLA's CPU reductions are scalar loops, 5 times slower.
    leaves = [leaf.astype(wide(leaf.dtype)) for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    return jnp.sqrt(total([jnp.vdot(part, part) for (part,) in _together(tree, leaves)]))


def _together(tree: PyTree, *sides: Sequence[jax.Array]) -> Iterator[list[jax.Array]]:
    """The leaves of trees like `tree`, small ones of one dtype as one vector, for sums over them.

    XLA's CPU backend compiles up to three kernels for the sum of a small leaf. Beside `Rows`, which
    lie where their examples do, leaves stay as they are: one vector would be gathered.
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Rows))
    small = 0 if any(isinstance(node, Rows) for node in nodes) else _SMALL
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(sides[0]):
        groups.setdefault(leaf.dtype if leaf.size < small else i, []).append(i)
    for first, *others in groups.values():
        if others:
            both = first, *others
            yield [jnp.concatenate([side[i].reshape(-1) for i in both]) for side in sides]
        else:
            yield [side[first] for side in sides]


def total(scalars: Sequence[jax.Array]) -> jax.Array:
    """Their sum, 0 of none; as one reduction: XLA's CPU backend compiles each `+` on its own."""
    return jnp.stack(scalars).sum() if scalars else jnp.float32(0.0)


def masked(tree: PyTree, flags: PyTree) -> PyTree:
    """Zeros where the flag of a leaf, a bool or an array of them, is False; None: all stay."""
    if flags is None:
        return tree

    def keep(leaf, flag):
        if isinstance(flag, bool):
            return leaf if flag else jnp.zeros_like(leaf)
        return jnp.where(flag, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(keep, tree, flags)


def dot(tree: PyTree, other: PyTree) -> jax.Array:
    """Inner product of two trees of floats, in float32 at least."""
    left, treedef = jax.tree.flatten(tree)
    dtypes = [wide(leaf.dtype) for leaf in left]
    left, right = (
        [leaf.astype(dtype) for leaf, dtype in zip(side, dtypes, strict=True)]
        for side in (left, treedef.flatten_up_to(other))
    )
    return total([jnp.vdot(*pair) for pair in _together(tree, left, right)])


def ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """Top / bottom of two lengths; 0/0 is 0, and what is NaN stays so."""
    whole = top / jnp.where(bottom == 0, 1.0, bottom)
    return jnp.where(bottom == 0, jnp.where(top == 0, 0.0, jnp.inf), whole)


def check_gatherable(index: jax.Array) -> None:
    """Raises where JAX would not say for itself how rows that are looked up shall lie.

    Raises:
        ValueError: the index is spread over Explicit axes of a mesh.
    """
    sharding = jax.typeof(index).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    if explicit and any(axes is not None for axes in sharding.spec):
        raise ValueError(
            f"the minibatch lies over Explicit axes of a mesh ({sharding.spec}), where JAX looks "
            "up no rows (per-sample weights, domains, padding): make the mesh with "
            "bf.sharding.make_mesh, or with axis_types=(jax.sharding.AxisType.Auto,) for each axis"
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
    index = wide_index(index)
    check_gatherable(index)
    inside = jnp.where((index >= 0) & (index < leaf.shape[0]), index, leaf.shape[0])
    return leaf.at[inside].get(mode="fill", fill_value=jnp.nan)


def copied(tree: PyTree) -> PyTree:
    """A copy of every leaf as a strongly typed array, so that no two leaves share a buffer.

    Tables are taken as they are: whoever makes one makes a new one, and two would not fit.
    """

    def copy(node):
        if isinstance(node, Table):
            return node
        return jnp.array(node, jnp.result_type(node), copy=True)

    return jax.tree.map(copy, tree, is_leaf=lambda node: isinstance(node, Table))
