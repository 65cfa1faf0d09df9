"""Whose turn it is in a step, and what a turn is: an optimiser, fed its direction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import PyTree, Variables


def learnable(tree: PyTree) -> PyTree:
    """The tree with None for leaves that are not differentiated: what an optimiser sees."""

    def keep(node):
        if rows.is_rows(node) or oracles.is_inexact(node):
            return node
        return None

    return jax.tree.map(keep, tree, is_leaf=rows.is_rows)


def turn(
    transform: optax.GradientTransformationExtraArgs,
    direction: PyTree,
    opt_state: PyTree,
    point: PyTree,
    extra: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """(the variable, its optimiser's state) after a step along the direction."""
    moved, after = transform.update(learnable(direction), opt_state, learnable(point), **extra)
    return rows.apply_updates(point, moved), after


def turn_if(
    now: jax.Array,
    transform: optax.GradientTransformationExtraArgs,
    direction: PyTree,
    opt_state: PyTree,
    point: PyTree,
    extra: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """The same where `now`, else (`point`, `opt_state`), which then cost no pass over memory.

    A loop of one pass or none: XLA runs it in place, where a branch copies what it hands through.
    """
    return jax.lax.fori_loop(
        0,
        now.astype(jnp.int32),
        lambda _, carry: turn(transform, direction, carry[1], carry[0], extra),
        (point, opt_state),
    )


def staged(
    evaluate: Callable[[Any], Any], stages: Sequence[Any], index: jax.Array
) -> tuple[Any, Variables]:
    """`evaluate(stages[index])`, completed to what the last, which leaves nothing out, returns.

    Args:
        evaluate: of a stage; returns a NamedTuple with `directions`, None for what stands still,
            and `metrics`.
        stages: the last has all directions and metrics.
        index: int32.

    Returns:
        What it returns, with zeros for directions (`Rows` that point nowhere) and NaN for metrics
        that are left out; for each variable whether it has a direction, bool scalars.
    """
    shapes = [jax.eval_shape(functools.partial(evaluate, stage)) for stage in stages]
    full = shapes[-1]

    def complete(stage):
        found = evaluate(stage)
        directions = Variables(
            *(
                _nothing(like) if part is None else part
                for part, like in zip(found.directions, full.directions, strict=True)
            )
        )
        unknown = {k: jnp.full(v.shape, jnp.nan, v.dtype) for k, v in full.metrics.items()}
        return found._replace(directions=directions, metrics=unknown | found.metrics)

    found = jax.lax.switch(index, [functools.partial(complete, stage) for stage in stages])
    columns = zip(*(shape.directions for shape in shapes), strict=True)
    moves = [jnp.array([part is not None for part in column])[index] for column in columns]
    return found, Variables(*moves)


def _nothing(like: PyTree) -> PyTree:
    def zeros(node):
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), node)
        if rows.is_rows(node):
            return empty._replace(index=jnp.full_like(empty.index, jnp.iinfo(jnp.int32).max))
        return empty

    return jax.tree.map(zeros, like, is_leaf=rows.is_rows)
