"""The parts of a step: an optimiser fed its direction, what rests, what must leave no trace."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import per_sample as rows
from bilevel_flax.base import (
    Estimate,
    Finite,
    Info,
    PyTree,
    Table,
    TrainState,
    Variables,
)
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers import lookahead
from bilevel_flax.tree import filter_inexact, norm, nowhere, zeros_like

# Each variable and its optimiser's state in a TrainState.
_FIELDS = (
    ("inner_params", "inner_opt_state"),
    ("adjoint", "adjoint_opt_state"),
    ("outer_params", "outer_opt_state"),
)
_REFUSAL = re.compile("unexpected keyword argument|not consumed", re.IGNORECASE)
_QUOTED = re.compile(r"'(\w+)'")


def tolerant(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, handed those extra arguments only that it takes (SAM refuses all others).

    `optax.lookahead` is one of parameters that are no pair: see `lookahead.py`.
    """
    transform = optax.with_extra_args_support(transform)

    def update(updates, state, params=None, **extra_args):
        while True:
            try:
                return lookahead.update(transform, updates, state, params, **extra_args)
            except TypeError as error:
                refused = set(_QUOTED.findall(str(error))) & extra_args.keys()
                if not refused or not _REFUSAL.search(str(error)):
                    raise
                extra_args = {k: v for k, v in extra_args.items() if k not in refused}

    return type(transform)(functools.partial(lookahead.init, transform), update)


def optimizer_step(
    transform: optax.GradientTransformationExtraArgs,
    direction: PyTree,
    opt_state: PyTree,
    params: PyTree,
    active: jax.Array | None = None,
    alive: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """`(params, opt_state)` after one Optax step along a direction.

    Args:
        transform: the optimiser.
        direction: what it is fed; its leaves that are no floats are left out.
        opt_state: its state.
        params: the variable.
        active: bool scalar; where False, both come back as they were. None: True.
        alive: the same, for a variable that rests by accident alone (a direction is not finite).
        **extra_args: handed to the optimiser.
    """

    def step(params, opt_state):
        updates, opt_state = transform.update(
            filter_inexact(direction), opt_state, filter_inexact(params), **extra_args
        )
        return rows.apply_updates(params, updates), opt_state

    if active is None and alive is None:
        return step(params, opt_state)
    if active is None:
        # A choice between old and new afterwards would keep copies of the moments and of params.
        return jax.lax.cond(alive, step, lambda *same: same, params, opt_state)
    # A loop of one pass or none: XLA runs it in place, where a branch copies what it hands through.
    return jax.lax.fori_loop(
        0, active.astype(jnp.int32), lambda _, carry: step(*carry), (params, opt_state)
    )


def switch_updates(updates: Sequence[Callable[[], Estimate]], index: jax.Array) -> Estimate:
    """`updates[index]()`, completed to what the last of them, which leaves nothing out, returns.

    Args:
        updates: each gives an `Estimate` with its `norms`; a direction that is left out is None.
        index: int32.

    Returns:
        The estimate, with zeros for directions (`Rows` that point nowhere) and NaN for metrics that
        are left out, and `active` for what has a direction. Of the oracles nothing is kept: what
        rests in a step is neither evaluated nor copied.
    """

    def bare(update):
        estimate = update()
        return estimate._replace(evaluation=estimate.evaluation._replace(oracles=None))

    shapes = [jax.eval_shape(functools.partial(bare, update)) for update in updates]
    full = shapes[-1]

    def completed(update):
        estimate = bare(update)
        directions = Variables(
            *(
                zeros_like(like) if part is None else part
                for part, like in zip(estimate.directions, full.directions, strict=True)
            )
        )
        like = full.evaluation.metrics
        unknown = {k: jnp.full(v.shape, jnp.nan, v.dtype) for k, v in like.items()}
        evaluation = estimate.evaluation
        evaluation = evaluation._replace(metrics=unknown | evaluation.metrics, directions=None)
        estimate = estimate._replace(directions=directions, evaluation=evaluation)
        like = full._replace(evaluation=full.evaluation._replace(directions=None))
        return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), estimate, like)

    estimate = jax.lax.switch(index, [functools.partial(completed, update) for update in updates])
    columns = zip(*(shape.directions for shape in shapes), strict=True)
    active = (
        None if all(moves) else jnp.array(moves)[index]
        for moves in ([part is not None for part in column] for column in columns)
    )
    return estimate._replace(active=Variables(*active))


def direction_norms(directions: Variables) -> Variables:
    """Euclidean norms of the directions, of float32 at least; 0 for one that is left out."""
    return Variables(*(norm(direction) for direction in directions))


def norms_and_finite(estimate: Estimate) -> tuple[Variables, Finite]:
    """The directions' norms, and which of them are finite."""
    norms = estimate.norms or direction_norms(estimate.directions)
    return norms, Finite(*(jnp.isfinite(value) for value in norms))


def move_outer(
    transform: optax.GradientTransformationExtraArgs,
    d_x: PyTree,
    alive: jax.Array,
    state: TrainState,
    active: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree, PyTree]:
    """X's step along D_x: `(outer_params, outer_opt_state, D_x as the optimiser saw it)`.

    A row-sparse optimiser is handed `Rows` that point nowhere unless `alive`, so that no table
    moves: a choice between two versions of one afterwards would copy all its rows. Any other is
    handed a dense direction.
    """
    if isinstance(transform, RowTransformation):
        d_x, whole = mask_rows(alive, d_x), None
    else:
        d_x, whole = rows.densify(d_x, state.outer_params), alive
    args = transform, d_x, state.outer_opt_state, state.outer_params
    return *optimizer_step(*args, active, whole, **extra_args), d_x


def mask_rows(alive: jax.Array, direction: PyTree) -> PyTree:
    """The direction with every `Rows` pointing at no row unless alive, so that no table moves."""

    def mask(node):
        if not rows.is_rows(node):
            return node
        return node._replace(index=jnp.where(alive, node.index, nowhere(node).index))

    return jax.tree.map(mask, direction, is_leaf=rows.is_rows)


def rollback_unless(alive: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where alive, else `old`; tables are taken as they are (they only hold finite rows).

    What is one and the same in both costs nothing.
    """

    def select(after, before):
        if isinstance(after, Table) or after is before:
            return after
        return jnp.where(alive, after, before)

    return jax.tree.map(select, new, old, is_leaf=lambda node: isinstance(node, Table))


def rollback_unless_finite(
    finite: Variables, new: TrainState, old: TrainState, d_x: PyTree
) -> TrainState:
    """`new` where every direction is finite, else `old`: a NaN leaves no trace in the state.

    Leaves of x that moved by `Rows` of `d_x` are taken as they are; `move_outer` has seen to it.
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

    chosen = rollback_unless(all_finite(finite), wrapped(new), wrapped(old))
    plain = jax.tree.map(
        lambda node: node.rows if is_table(node) else node, chosen.outer_params, is_leaf=is_table
    )
    return chosen.replace(outer_params=plain)


def updated(new: TrainState, old: TrainState, taken: Sequence[bool]) -> TrainState:
    """`old` with the variables that are `taken`, and their optimisers, from `new`.

    Their step has kept a NaN out already; a choice between two versions of them would copy both.
    """
    names = [name for both, yes in zip(_FIELDS, taken, strict=True) if yes for name in both]
    return old.replace(**{name: getattr(new, name) for name in names})


def all_finite(finite: Variables) -> jax.Array:
    """Whether the three directions are finite."""
    return finite.inner & finite.adjoint & finite.outer


def make_info(evaluation: Any, norms: Variables, finite: Finite, units: Any) -> Info:
    """The `Info` of an update."""
    return Info(
        inner_loss=evaluation.inner_loss,
        outer_loss=evaluation.outer_loss,
        norms=norms,
        finite=finite,
        adjoint_residual=evaluation.residual,
        oracle_units=jnp.float32(units),
        metrics=evaluation.metrics,
    )
