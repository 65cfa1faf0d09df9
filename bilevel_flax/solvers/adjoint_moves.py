"""Steps of v as v⁺ = keep · v + factor · U: who damps, bounds or scales one changes two numbers.

Each of them on its own would pass over all parameters twice, once for its step and once for the
length of that, and XLA's CPU backend compile kernels for every leaf.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import PyTree
from bilevel_flax.tree import norm, wide


class Move(NamedTuple):
    """A step of v, not yet taken: v⁺ = keep · v + factor · direction."""

    keep: jax.Array  # scalar
    factor: jax.Array  # scalar
    direction: PyTree  # U, tree of v
    length: jax.Array  # ‖U‖

    def shortened(self, share: jax.Array) -> Move:
        """The move to `share` of where this one leads."""
        return self._replace(keep=share * self.keep, factor=share * self.factor)


Plan = Callable[..., tuple[Move, PyTree]]  # as an optimiser's `update`, but returns a `Move`


class MoveTransformation(optax.GradientTransformationExtraArgs):
    """An optimiser of v that can hand on its step as a `Move`."""

    plan: Plan | None = None


def from_plan(init: Callable, plan: Plan) -> MoveTransformation:
    """The optimiser whose `update` takes the steps of `plan`."""

    def update(updates, state, params=None, **extra_args):
        move, state = plan(updates, state, params, **extra_args)

        def leaf(u, v):
            dtype = wide(u.dtype)  # what scales a unit away may itself be no float16
            factor, less = (s.astype(dtype) for s in (move.factor, move.keep - 1))
            return (factor * u.astype(dtype) + less * v.astype(dtype)).astype(u.dtype)

        return jax.tree.map(leaf, move.direction, params), state

    made = MoveTransformation(init, update)
    made.plan = plan
    return made


def plan_of(transform: optax.GradientTransformation) -> Plan:
    """Any optimiser's steps as `Move`s."""
    if isinstance(transform, MoveTransformation) and transform.plan is not None:
        return transform.plan
    step = optax.with_extra_args_support(transform)

    def plan(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        moved, state = step.update(updates, state, params, **extra_args)
        one = jnp.float32(1.0)
        return Move(one, one, moved, norm(moved)), state

    return plan


def direction_length(updates: PyTree, extra_args: dict[str, Any]) -> jax.Array:
    """‖updates‖, which need not be taken anew where `updates` is D_v as `single_loop` made it."""
    known = extra_args.get("direction_length")
    leaves, made = jax.tree.leaves(updates), jax.tree.leaves(extra_args.get("grad"))
    same = len(leaves) == len(made) and all(map(operator.is_, leaves, made))
    return norm(updates) if known is None or not same else known
