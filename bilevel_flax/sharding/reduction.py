"""What goes between the devices in a step: parts of z and v together, sums of directions apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from bilevel_flax import per_sample as rows
from bilevel_flax.base import PyTree, Variables
from bilevel_flax.tree import is_inexact


def whole_leaves(tree: PyTree, specs: list) -> PyTree:
    """The leaves' parts on all devices put together."""
    leaves, treedef = jax.tree.flatten(tree)
    for i, spec in enumerate(specs):
        for axis, entry in enumerate(spec):
            if entry is not None:
                leaves[i] = lax.all_gather(leaves[i], entry, axis=axis, tiled=True)
    return treedef.unflatten(leaves)


_LIKE_Z = ("inner_grad", "hvp", "outer_grad_inner")


def taken_apart(tree: Any, z_structure: Any) -> tuple[dict, Callable]:
    """What is like z (by leaf), what belongs to examples, and the rest; and the way back."""
    evaluation, sketched = tree
    values, combined = evaluation.oracles, evaluation.directions
    like_z = {name: getattr(values, name) for name in _LIKE_Z}
    if combined is not None:
        like_z |= {"d_z": combined.inner, "d_v": combined.adjoint}
    like_z = {name: tree for name, tree in like_z.items() if tree is not None}
    other = evaluation._replace(
        oracles=values._replace(**dict.fromkeys(_LIKE_Z)),
        directions=None if combined is None else combined.outer,
    )
    leaves, treedef = jax.tree.flatten((other, sketched), is_leaf=rows.is_rows)
    columns = [z_structure.flatten_up_to(tree) for tree in like_z.values()]
    parts = {
        "like_z": [list(row) for row in zip(*columns, strict=True)]
        or [[] for _ in range(z_structure.num_leaves)],
        "by_row": [leaf for leaf in leaves if rows.is_rows(leaf)],
        "rest": [leaf for leaf in leaves if not rows.is_rows(leaf)],
    }
    where = [rows.is_rows(leaf) for leaf in leaves]

    def join(parts):
        by_row, rest = iter(parts["by_row"]), iter(parts["rest"])
        joined = [next(by_row) if is_rows else next(rest) for is_rows in where]
        other, sketched = treedef.unflatten(joined)
        back = {
            name: z_structure.unflatten([row[i] for row in parts["like_z"]])
            for i, name in enumerate(like_z)
        }
        d_z, d_v = back.pop("d_z", None), back.pop("d_v", None)
        combined = None if d_z is None else Variables(d_z, d_v, other.directions)
        values = other.oracles._replace(**back)
        return other._replace(oracles=values, directions=combined), sketched

    return parts, join


def reduced(parts: dict, like_z: list, axes: tuple[str, ...]) -> dict:
    """The sums over all devices, each leaf of z to those that keep it; in one phase."""
    if not axes:
        return parts
    pending: dict[tuple, list] = {}  # axes that are left -> (place, array)

    def put(place, leaf, names):
        pending.setdefault(tuple(names), []).append((place, leaf))

    for i, (row, spec) in enumerate(zip(parts["like_z"], like_z, strict=True)):
        for j, leaf in enumerate(row):
            if not is_inexact(leaf):
                continue
            leaf, left = _scattered(leaf, spec, axes)
            put(("like_z", i, j), leaf, left)
    for i, leaf in enumerate(parts["rest"]):
        if is_inexact(leaf):
            put(("rest", i), leaf, axes)
    out = {"like_z": [list(row) for row in parts["like_z"]], "rest": list(parts["rest"])}
    for names, entries in pending.items():
        arrays = [leaf for _, leaf in entries]
        for (place, _), leaf in zip(
            entries, lax.psum(arrays, names) if names else arrays, strict=True
        ):
            if place[0] == "rest":
                out["rest"][place[1]] = leaf
            else:
                out["like_z"][place[1]][place[2]] = leaf
    return out


def _scattered(leaf: jax.Array, spec: Any, axes: tuple[str, ...]) -> tuple[jax.Array, list[str]]:
    """The parts that devices keep of a leaf's sum, and the axes over which it is still to be taken.

    A sum over further axes is one to be scattered there, too, and gathered: in one with the first.
    """
    left = list(axes)
    for axis, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        names = tuple(name for name in names if name in left)
        if not names:
            continue
        left = [name for name in left if name not in names]
        others = tuple(left)
        cut_later = any(other is not None for other in spec[axis + 1 :])
        if others and not cut_later and leaf.shape[axis] % lax.axis_size((*names, *others)) == 0:
            leaf = lax.psum_scatter(leaf, (*names, *others), scatter_dimension=axis, tiled=True)
            return lax.all_gather(leaf, others, axis=axis, tiled=True), []
        leaf = lax.psum_scatter(leaf, names, scatter_dimension=axis, tiled=True)
    return leaf, left
