"""One variable's part of a step: its optimiser, and how it stands still when it is not its turn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import oracles, rows
from bilevel_flax.base import PyTree
from bilevel_flax.freezing import frozen_unless, muted_unless


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
    """The same where `now`, else (`point`, `opt_state`), which then cost no pass over memory."""
    return jax.lax.cond(
        now,
        lambda: turn(transform, direction, opt_state, point, extra),
        lambda: (point, opt_state),
    )


def muted_turn_if(
    now: jax.Array,
    transform: optax.GradientTransformationExtraArgs,
    direction: PyTree,
    opt_state: PyTree,
    point: PyTree,
    extra: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """The same for directions with `Rows`: they point at no row unless `now`.

    A branch would copy whole tables.
    """
    moved, after = transform.update(
        muted_unless(now, learnable(direction)), opt_state, learnable(point), **extra
    )
    moved = jax.tree.map(
        lambda node: node if rows.is_rows(node) else jnp.where(now, node, jnp.zeros_like(node)),
        muted_unless(now, moved),
        is_leaf=rows.is_rows,
    )
    return rows.apply_updates(point, moved), frozen_unless(now, after, opt_state)
