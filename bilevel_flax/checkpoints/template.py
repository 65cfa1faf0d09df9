"""What a reader expects: leaves by name, which say where the values go, and their records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.checkpoints.errors import CheckpointMismatch
from bilevel_flax.checkpoints.records import Record, describe, first_mismatch, named_leaves, nested

# Leaves that checkpoints of before 0.2 lack, and that start at 0: what SABA's mean has lost.
_SINCE_ZERO = re.compile(r"^estimator_state\.(inner|outer)\.lost\.")


class Template:
    """A state, or some of its fields.

    Args:
        tree: of arrays or `jax.ShapeDtypeStruct`. With `in_parts` a dict of fields by name, with
            None for those that are to be read as they were saved, to the default device.
        in_parts: whether the tree is such a dict; the rest of the state is then left out.

    Raises:
        TypeError: a leaf of the tree is not an array.
    """

    def __init__(self, tree: Any, in_parts: bool = False):
        self._tree = tree
        self._as_saved = {name for name, part in tree.items() if part is None} if in_parts else ()
        self._parts = set(tree) if in_parts else None
        self.leaves = named_leaves(tree)
        self._records = {name: describe(name, leaf) for name, leaf in self.leaves.items()}

    def match(self, saved: Mapping[str, Record], path: str) -> dict[str, Any]:
        """The leaves to read, as they are here or else as they were saved.

        Raises:
            CheckpointMismatch: it is another model's; the first differing leaf is named.
        """
        leaves = dict(self.leaves)
        if self._parts is not None:
            missing = self._parts - {_part(name) for name in saved}
            if missing:
                there = ", ".join(dict.fromkeys(map(_part, saved)))
                raise CheckpointMismatch(f"{path!r} has no {min(missing)!r}, it has {there}.")
            for name, record in saved.items():
                if _part(name) in self._as_saved:
                    leaves[name] = jax.ShapeDtypeStruct(record.shape, record.dtype)
            given = self._parts.difference(self._as_saved)
            saved = {name: record for name, record in saved.items() if _part(name) in given}
        newer = {n for n in self._records if n not in saved and _SINCE_ZERO.search(n)}
        leaves = {name: leaf for name, leaf in leaves.items() if name not in newer}
        expected = {name: record for name, record in self._records.items() if name not in newer}
        mismatch = first_mismatch(saved, expected)
        if mismatch is not None:
            whole = set(map(_part, saved)) - set(map(_part, self._records))
            whose, hint = "another model", ""
            if whole:
                hint = " (`restore_parts` reads some fields of a state)"
            elif _of_variables(saved) == _of_variables(expected) != {}:
                whose = "the same z and x under another solver, optimiser or version"
                hint = "; checkpoints.warm_start goes on from its z and x, with all else afresh"
            raise CheckpointMismatch(f"{path!r} is a checkpoint of {whose}: {mismatch}{hint}.")
        return leaves

    def fill(self, values: Mapping[str, Any]) -> Any:
        """The tree with values by name; nested dicts where a part was to be read as saved."""
        values = {
            **{n: _zeros(leaf) for n, leaf in self.leaves.items() if n not in values},
            **values,
        }
        if self._parts is None:
            values = {name: values[name] for name in self.leaves}
            structure = jax.tree_util.tree_structure(self._tree)
            return jax.tree_util.tree_unflatten(structure, list(values.values()))
        parts: dict[str, Any] = {}
        for part, tree in self._tree.items():
            inside = {n[len(part) + 1 :]: value for n, value in values.items() if _part(n) == part}
            structure = jax.tree_util.tree_structure(tree)
            parts[part] = (
                nested(inside.items())
                if part in self._as_saved
                else jax.tree_util.tree_unflatten(structure, list(inside.values()))
            )
        return parts


def _zeros(leaf: Any) -> jax.Array:
    zeros = jnp.zeros(leaf.shape, leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    return zeros if sharding is None else jax.device_put(zeros, sharding)


def _of_variables(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records of z and x alone, without what tells values apart."""
    return {
        name: record._replace(checksum="")
        for name, record in records.items()
        if _part(name) in ("inner_params", "outer_params")
    }


def _part(name: str) -> str:
    return name.partition(".")[0]
