"""A state of which every process holds a part, made whole for those who read it."""

from __future__ import annotations

from typing import Any

import jax

from bilevel_flax.base import TrainState
from bilevel_flax.train import multihost

# The parts of a state that evaluations read; optimisers' states and tables are large and stay.
_POINT = ("step", "inner_params", "adjoint", "outer_params", "model_state", "rng")


def gather_to_host(state: TrainState) -> TrainState:
    """The state with its point (z, v, x) and model state whole on this process.

    All processes must call it. Leaves that a process has all of are not copied: the result is gone
    when they are donated.
    """
    if multihost.process_count() == 1:
        return state

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if not leaf.is_fully_replicated:
            mesh = leaf.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            leaf = jax.jit(lambda array: array, out_shardings=everywhere)(leaf)
        return leaf.addressable_data(0)

    return state.replace(**jax.tree.map(whole, {name: getattr(state, name) for name in _POINT}))


class OnWholeState:
    """An action of a single process, on a state of which every process holds a part.

    Args:
        action: has a `schedule`, and takes a whole state and its step.
        processes: all of them; where the action fails on one, it fails on all.
    """

    def __init__(self, action: Any, processes: multihost.Channel):
        self._action, self._processes = action, processes
        self.schedule = action.schedule

    def __call__(self, state: TrainState, step: int) -> Any:
        """What the action returns here."""
        whole = gather_to_host(state)
        return self._processes.run_on_each(lambda: self._action(whole, step))
