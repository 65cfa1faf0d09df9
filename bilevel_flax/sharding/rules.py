"""Which axis of a leaf lies along which axis of the mesh: rules, metadata, or a default.

A specification comes from the first of these that says something about a leaf of z:

* the model itself, where its leaves carry Flax's metadata (`nn.with_partitioning`,
  `nn.with_logical_partitioning`);
* the rules: pairs of a regular expression, searched for in the leaf's path
  ("blocks/attention/query/kernel"), and a PartitionSpec; the first match wins;
* otherwise, where fsdp > 1 and there are no rules, the leaf's largest axis that fsdp divides lies
  along fsdp; with rules, a leaf that none of them matches is replicated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from bilevel_flax.base import PyTree
from bilevel_flax.sharding.mesh import AXES

# A leaf smaller than this is cheaper to keep whole than to gather.
_SMALL = 2**10


def path_name(path: tuple) -> str:
    """A leaf's path as rules see it: "blocks/0/kernel"."""
    return "/".join(_key(entry) for entry in path)


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def as_spec(value: Any) -> PartitionSpec:
    """A PartitionSpec from one, from a tuple of names, or from a line like "fsdp,tensor".

    In a line "-" (or nothing) stands for an axis that is not cut, and "data+fsdp" for two axes
    of the mesh together.

    Raises:
        ValueError: an axis that no mesh has.
    """
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")] if value.strip() else []
        entries = [
            None if part in ("", "-") else tuple(part.split("+")) if "+" in part else part
            for part in parts
        ]
    else:
        entries = list(value)
    for entry in entries:
        for name in _names(entry):
            if name not in AXES:
                raise ValueError(
                    f"a sharding rule asks for the mesh axis {name!r}: choose from "
                    f'{", ".join(AXES)}, e.g. PartitionSpec("fsdp", None) or "fsdp,-"'
                )
    return PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in entries))


def _names(entry: Any) -> tuple:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def parts_along(mesh: Mesh | AbstractMesh, entry: Any) -> int:
    """The number of pieces into which one entry of a PartitionSpec cuts an axis."""
    pieces = 1
    for name in _names(entry):
        pieces *= mesh.shape[name]
    return pieces


def check_divides(
    name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    """Raises unless `spec` cuts an array of this shape into equal pieces.

    Raises:
        ValueError: names the leaf, the axis and the sizes.
    """
    if len(spec) > len(shape):
        raise ValueError(
            f"the sharding of {name} is {spec}, but the leaf has shape {tuple(shape)}: "
            "give at most one entry for each axis"
        )
    for axis, entry in enumerate(spec):
        pieces = parts_along(mesh, entry)
        if shape[axis] % pieces:
            raise ValueError(
                f"the sharding of {name} is {spec}, but its axis {axis} has size {shape[axis]}, "
                f"which the {pieces} devices along {'+'.join(_names(entry))} do not divide: "
                "change the rule, the mesh or the size"
            )


def largest_axis(shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The default: the largest axis that fsdp divides lies along it; small leaves stay whole."""
    pieces = mesh.shape["fsdp"]
    size = 1
    for length in shape:
        size *= length
    if pieces == 1 or size < _SMALL:
        return PartitionSpec()
    fitting = [axis for axis, length in enumerate(shape) if length >= pieces > 0 == length % pieces]
    if not fitting:
        return PartitionSpec()
    chosen = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * chosen, "fsdp")


def _is_box(node: Any) -> bool:
    return isinstance(node, meta.AxisMetadata)


def _spec_of_box(box: Any, name: str, logical: Sequence) -> PartitionSpec | None:
    """What Flax's metadata says about a leaf, in axes of the mesh."""
    if isinstance(box, nn.LogicallyPartitioned):
        known = dict(logical) or dict(box.rules or ())
        missing = [axis for axis in box.names if axis is not None and axis not in known]
        if missing:
            raise ValueError(
                f"{name} has the logical axis {missing[0]!r}, which no rule maps to the mesh: "
                f'add a pair, e.g. ("{missing[0]}", "fsdp") or ("{missing[0]}", None)'
            )
        return as_spec(tuple(None if axis is None else known[axis] for axis in box.names))
    if isinstance(box, nn.Partitioned):
        return as_spec(tuple(box.names))
    return None


def param_specs(params: PyTree, mesh: Mesh | AbstractMesh, rules: Any = None) -> PyTree:
    """A PartitionSpec for each leaf of z.

    Args:
        params: z, arrays or shapes.
        mesh: from `make_mesh`.
        rules: a sequence of pairs (regular expression, PartitionSpec), or a pytree of
            PartitionSpecs with z's structure (`nn.get_partition_spec`,
            `sharding.module_specs`), or one of NamedShardings (a host's own, on a mesh of any
            axes); None: the default. Where leaves carry logical axes, pairs (logical axis, axis
            of the mesh or None).

    Returns:
        A pytree of PartitionSpecs with z's structure.

    Raises:
        ValueError: a rule that matches nothing, an axis that no mesh has, a logical axis without
            a rule, or a size that the mesh does not divide.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
        >>> z = {"layer": {"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)}}
        >>> param_specs(z, mesh)["layer"]["kernel"]
        P(None, 'fsdp')
        >>> param_specs(z, mesh, [("kernel", ("fsdp", None))])["layer"]["kernel"]
        P('fsdp', None)
    """
    nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=_is_box)
    boxed = any(_is_box(node) for _, node in nodes)
    tree = _as_tree(rules, params, mesh)
    if tree is not None:
        specs = tree
    else:
        pairs = [] if rules is None else [_as_pair(rule) for rule in rules]
        logical = pairs if any(isinstance(n, nn.LogicallyPartitioned) for _, n in nodes) else []
        specs, used = [], set()
        for path, node in nodes:
            name = path_name(path)
            spec = _spec_of_box(node, name, logical) if _is_box(node) else None
            if spec is None:
                spec, number = _matched(name, pairs)
                used |= {number} - {None}
            if spec is None and rules is None and not boxed:
                spec = largest_axis(jax.tree.leaves(node)[0].shape, mesh)
            specs.append(PartitionSpec() if spec is None else spec)
        lost = [] if logical else [p[0] for i, p in enumerate(pairs) if i not in used]
        if lost:
            names = [path_name(path) for path, _ in nodes]
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(
                f"the sharding rule{'s' if len(lost) > 1 else ''} "
                f"{', '.join(repr(pattern) for pattern in lost)} "
                f"match{'' if len(lost) > 1 else 'es'} no leaf of inner_params "
                f"(or an earlier rule has them all); its paths are {shown}"
            )
    for (path, node), spec in zip(nodes, specs, strict=True):
        check_divides(path_name(path), jax.tree.leaves(node)[0].shape, spec, mesh)
    # A box is a node of its own: its spec belongs to the array inside.
    whole = [
        jax.tree.map(lambda _, s=spec: s, node)
        for (_, node), spec in zip(nodes, specs, strict=True)
    ]
    return treedef.unflatten(whole)


def _matched(name: str, pairs: Sequence) -> tuple[PartitionSpec | None, int | None]:
    for number, (pattern, value) in enumerate(pairs):
        if re.search(pattern, name):
            return as_spec(() if value is None else value), number
    return None, None


def _as_pair(rule: Any) -> tuple[str, Any]:
    if isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str):
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(
                f"the sharding rule {rule[0]!r} is no regular expression: {error}"
            ) from None
        return rule[0], rule[1]
    raise ValueError(
        f"a sharding rule is a pair (regular expression, PartitionSpec), got {rule!r}: write "
        'e.g. ("kernel$", PartitionSpec(None, "fsdp"))'
    )


def _as_tree(rules: Any, params: PyTree, mesh: Mesh | AbstractMesh) -> list[PartitionSpec] | None:
    """The rules' leaves where they are a pytree of PartitionSpecs or NamedShardings already."""
    is_spec = lambda node: isinstance(node, (PartitionSpec, NamedSharding))
    if rules is None or (isinstance(rules, (tuple, list)) and not is_spec(rules)):
        return None
    given, structure = jax.tree.flatten(rules, is_leaf=is_spec)
    if not given or not all(is_spec(leaf) for leaf in given):
        raise ValueError(
            f"sharding rules must be pairs (regular expression, PartitionSpec) or a pytree of "
            f"PartitionSpecs or NamedShardings like inner_params, got {type(rules).__name__}"
        )
    expected = jax.tree.structure(jax.tree.map(lambda _: 0, params, is_leaf=_is_box))
    if structure != expected:
        raise ValueError(
            f"the pytree of shardings differs from inner_params: {structure} against {expected}"
        )
    return [_own_spec(leaf, mesh) if _is_own(leaf) else as_spec(leaf) for leaf in given]


def _is_own(leaf: Any) -> bool:
    return isinstance(leaf, NamedSharding)


def _own_spec(sharding: NamedSharding, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The specification of a host's sharding, which names axes of that very mesh."""
    if dict(sharding.mesh.shape) != dict(mesh.shape):
        raise ValueError(
            f"the NamedShardings lie on a mesh {dict(sharding.mesh.shape)}, but mesh= is "
            f"{dict(mesh.shape)}: hand over the mesh of the shardings"
        )
    return sharding.spec
