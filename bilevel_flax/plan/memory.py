"""What the memory of one chip holds."""

from __future__ import annotations

from typing import Any

import jax

from bilevel_flax.plan.step import Compiled, Lowered, bytes_on_a_chip

# Name -> fields of the state, in the order of the table.
_PARTS = {
    "z": ("inner_params",),
    "v": ("adjoint",),
    "moments of z": ("inner_opt_state",),
    "moments of v": ("adjoint_opt_state",),
    "x and its moments": ("outer_params", "outer_opt_state"),
    "tables": ("estimator_state",),
    "model state": ("model_state", "step", "rng"),
}


def composition(lowered: Lowered, compiled: Compiled) -> dict[str, int]:
    """Bytes on one chip by what they are; they add up to what is needed.

    Returns:
        name -> bytes: the parts of the state, the minibatch, "activations" (all temporaries:
        also gathered parameters and directions), and "other" (padding to tiles, code).
    """
    parts = {
        name: sum(
            _bytes(getattr(lowered.state, field), getattr(lowered.shardings, field))
            for field in fields
        )
        for name, fields in _PARTS.items()
    }
    parts["minibatch"] = _bytes(lowered.batch, lowered.batch_shardings)
    parts["activations"] = int(compiled.temporary_bytes)
    other = compiled.hbm_bytes_needed - sum(parts.values())
    return parts | {"other": max(0, other)}


def parameter_bytes(lowered: Lowered) -> int:
    """Bytes of the whole of z."""
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(lowered.state.inner_params)
    )


def _bytes(shapes: Any, shardings: Any) -> int:
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(bytes_on_a_chip(leaf, sharding) for leaf, sharding in pairs)
