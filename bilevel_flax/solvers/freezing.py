"""A step that is not finite leaves no trace: the choice between a state and the one before."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import PyTree, Rows, Table, TrainState


def frozen_unless(alive: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where alive, else `old`; tables are taken as they are (they only hold finite rows).

    What is one and the same in both costs nothing.
    """

    def select(after, before):
        if isinstance(after, Table) or after is before:
            return after
        return jnp.where(alive, after, before)

    return jax.tree.map(select, new, old, is_leaf=lambda node: isinstance(node, Table))


def frozen_state(alive: jax.Array, new: TrainState, old: TrainState, d_x: PyTree) -> TrainState:
    """As `frozen_unless`; leaves of x that moved by rows are taken as they are.

    Their `Rows` in `d_x` are muted unless alive, so they did not move, and a choice between two
    versions of them would copy all n rows in every step.
    """

    def wrapped(state):
        return state.replace(
            outer_params=jax.tree.map(
                lambda node, leaf: Table(leaf) if rows.is_rows(node) else leaf,
                d_x,
                state.outer_params,
                is_leaf=rows.is_rows,
            )
        )

    def is_table(node):
        return isinstance(node, Table)

    chosen = frozen_unless(alive, wrapped(new), wrapped(old))
    plain = jax.tree.map(
        lambda node: node.rows if is_table(node) else node, chosen.outer_params, is_leaf=is_table
    )
    return chosen.replace(outer_params=plain)


def muted_unless(alive: jax.Array, direction: PyTree) -> PyTree:
    """The direction with every `Rows` pointing at no row unless alive, so that no table moves."""

    def mute(node):
        if not rows.is_rows(node):
            return node
        nowhere = jnp.iinfo(node.index.dtype).max
        return Rows(jnp.where(alive, node.index, nowhere), node.values)

    return jax.tree.map(mute, direction, is_leaf=rows.is_rows)
