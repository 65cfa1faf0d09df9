"""Losses that say where their activations lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from bilevel_flax.base import Problem
from bilevel_flax.oracles import wrap_losses


def in_mesh(problem: Problem, mesh: Mesh) -> Problem:
    """The problem with the mesh known where its losses are traced.

    `jax.lax.with_sharding_constraint(activations, PartitionSpec(("data", "fsdp")))` then means
    something there (and `jax.sharding.get_abstract_mesh()` tells a model whether it does). Left
    without such hints, XLA's partitioner may move activations to where the parameters are.

    Args:
        problem: solved under XLA's partitioner.
        mesh: from `make_mesh`.
    """

    def within(loss: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return loss(*args)

        return call

    return wrap_losses(problem, within)
