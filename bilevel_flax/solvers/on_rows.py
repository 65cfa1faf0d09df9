"""A solver on the rows of z that a minibatch is about: an inner problem for each example or task.

Where z has a row for each of n examples (hidden states of an equilibrium network) or tasks (adapted
parameters), a step concerns only the rows of its minibatch. `on_rows` hands a solver these alone,
so that directions, tangents and temporaries are those of a minibatch, whatever n is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, BilevelSolver, Method, TrainState
from bilevel_flax.checks import UserError
from bilevel_flax.minibatches import example_mask
from bilevel_flax.solvers.step import all_finite
from bilevel_flax.tree import rows_at, wide_index


def on_rows(solver: BilevelSolver, key: str, *, recurring: bool = True) -> BilevelSolver:
    """The solver on the minibatch's rows of z and v, every step of an update on the same ones.

    Both losses see z as `[batch, ...]` with `batch[key]` = 0, 1, ..., so that `z[batch[key]]` is
    right here and on all of z. Give the training loop minibatches of the same numbers for both
    losses (`Task(paired=True)`). Padding (`minibatches.example_mask`) moves no row. Rows are
    stored in z's dtype and computed with in float32 at least: float16 halves the tables (bfloat16
    too, but XLA's CPU backend writes its rows into a float32 copy of all of the table).

    Args:
        solver: of any method that remembers no rows: SGD for z, no memory of past gradients.
        key: of the minibatches (dicts), int32 [batch], the rows' positions; one occurs once. A
            position outside the rows, or one that occurs twice, gives NaN, which stops the run.
        recurring: z and v have a row for each of all n, which goes on where it was left. False:
            one for each place in a minibatch; all start at 0 in every update, and so does what
            the optimisers of z and v remember.

    Returns:
        A solver with `batches` (1, 1), whatever it takes by itself.

    Raises:
        ValueError: from `init`, where the solver remembers something about each row.
        UserError: from `update`, where a minibatch has no positions of rows.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z[batch["row"]] - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z[batch["row"]] - 1) ** 2).mean(),
        ... )
        >>> sgd = optax.sgd(1.0)
        >>> solver = bf.solvers.on_rows(bf.soba(problem, inner=sgd, outer=sgd), "row")
        >>> state = solver.init(jnp.zeros(5), jnp.array(3.0))
        >>> batch = {"row": jnp.array([3, 1])}
        >>> state, info = solver.update(state, bf.Batch(batch, batch))
        >>> state.inner_params.tolist()
        [0.0, 3.0, 0.0, 3.0, 0.0]
    """

    def init(inner_params, outer_params, **more) -> TrainState:
        state = solver.init(inner_params, outer_params, **more)
        remembered = [state.estimator_state]
        if recurring:
            remembered += [state.inner_opt_state, state.adjoint_opt_state]
        if any(jnp.ndim(leaf) for leaf in jax.tree.leaves(remembered)):
            raise ValueError(
                f"on_rows: {solver.name} or its optimiser of z remembers something about each row, "
                "which would be mixed up between minibatches: take bf.soba or bf.implicit with "
                "inner=optax.sgd(...)"
            )
        return state

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        index, mask = _positions(batch, key), example_mask(batch.inner)
        tables = state.inner_params, state.adjoint
        opt_states = state.inner_opt_state, state.adjoint_opt_state
        if recurring:
            rows = jax.tree.map(lambda leaf: _computed(_read(leaf, index, mask)), tables)
        else:
            rows = jax.tree.map(lambda leaf: _computed(jnp.zeros_like(leaf)), tables)
            opt_states = jax.tree.map(jnp.zeros_like, opt_states)
        here = {key: jnp.arange(len(index), dtype=index.dtype)}
        sides = [
            side | here if max(solver.batches) == 1 else _repeated(side | here, count)
            for side, count in zip(batch[:2], solver.batches, strict=True)
        ]
        small = state.replace(
            inner_params=rows[0],
            adjoint=rows[1],
            inner_opt_state=opt_states[0],
            adjoint_opt_state=opt_states[1],
        )
        new, info = solver.update(small, Batch(*sides))
        moved = new.inner_params, new.adjoint
        if recurring:
            finite = all_finite(info.finite)
            write = lambda leaf, row: _written(leaf, index, row.astype(leaf.dtype), mask, finite)
        else:
            write = lambda leaf, row: row.astype(leaf.dtype)
        z, v = jax.tree.map(write, tables, moved)
        return new.replace(inner_params=z, adjoint=v), info

    return BilevelSolver(init, update, method=solver.method._replace(batches=Method().batches))


def _positions(batch: Batch, key: str) -> jax.Array:
    for name, side in (("inner", batch.inner), ("outer", batch.outer)):
        index = side.get(key) if isinstance(side, Mapping) else None
        if index is None or jnp.ndim(index) != 1:
            raise UserError(
                f"on_rows needs batch.{name}[{key!r}], the positions [batch] of the minibatch's "
                f"rows of z, got {index if index is None else jnp.shape(index)}"
            )
        if not jnp.issubdtype(jnp.result_type(index), jnp.integer):
            raise UserError(f"batch.{name}[{key!r}] must be integers, got {jnp.result_type(index)}")
    return wide_index(batch.inner[key])


def _read(table: jax.Array, index: jax.Array, mask: Any) -> jax.Array:
    """The rows at `index`, those of padding some row; NaN where two of them would be one."""
    real = jnp.ones(index.shape, bool) if mask is None else mask > 0
    # Positions of padding may be anything: here they are below 0, each another.
    sort = jnp.sort(jnp.where(real, index, -1 - jnp.arange(len(index), dtype=index.dtype)))
    twice = jnp.any((sort[1:] == sort[:-1]) & (sort[1:] >= 0))
    rows = rows_at(table, jnp.where(real, index, 0))
    return jnp.where(twice, jnp.nan, rows)


def _written(
    table: jax.Array, index: jax.Array, rows: jax.Array, mask: Any, finite: jax.Array
) -> jax.Array:
    """The table with new rows at `index`, but for those of padding; as it was unless `finite`."""
    # Padding repeats a row: it would race with the row that it repeats.
    moves = finite if mask is None else finite & (mask > 0)
    return table.at[jnp.where(moves, index, len(table))].set(rows, mode="drop")


def _computed(leaf: jax.Array) -> jax.Array:
    """In float32 where it is stored in less."""
    short = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if short else leaf


def _repeated(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)
