"""`haliax.named_jit` for a step that is taken again and again.

`named_jit` works out the result's shardings in Python on each call, which takes longer the more
arrays there are: with a solver's state, a tenth of a step of 50 ms. They are the same for the same
structure: here they are worked out while `jax.jit` traces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haliax as hax
import jax
from haliax.partitioning import ResourceMapping, infer_resource_partitions


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Rest:
    """A tree without its arrays: to `jax.jit` a part of the structure."""

    structure: Any
    leaves: tuple[Any, ...]


def _apart(tree: Any) -> tuple[list[Any], _Rest]:
    """Its arrays, and the rest."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if eqx.is_array(leaf) else None for leaf in leaves]
    pairs = zip(leaves, arrays, strict=True)
    return arrays, _Rest(structure, tuple(a if b is None else None for a, b in pairs))


def _together(arrays: list[Any], rest: _Rest) -> Any:
    pairs = zip(arrays, rest.leaves, strict=True)
    return jax.tree.unflatten(rest.structure, [b if a is None else a for a, b in pairs])


class StateJit:
    """`named_jit(step, mapping, donate_args=(True,))`.

    Args:
        step: `step(state, *inputs) -> result`; all are trees with arrays and other leaves. The
            state is donated.
        mapping: of axis names to the mesh, within the step and for its result: arrays without
            names are replicated.
    """

    def __init__(self, step: Callable[..., Any], mapping: ResourceMapping):
        def train_step(state, inputs):
            with hax.axis_mapping(mapping):
                result = step(_together(*state), *_together(*inputs))
                shardings = infer_resource_partitions(
                    result, mapping, preserve_existing_shardings=False
                )
            return _apart(eqx.filter_shard(result, shardings))

        self._jitted = jax.jit(train_step, donate_argnums=0)

    def __call__(self, state: Any, *inputs: Any) -> Any:
        """What the step returns."""
        return _together(*self._jitted(_apart(state), _apart(inputs)))

    def lower(self, state: Any, *inputs: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s: Levanter logs its text."""
        return self._jitted.lower(_apart(state), _apart(inputs))
