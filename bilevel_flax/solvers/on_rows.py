"""A solver on the rows of z that a minibatch is about: an inner problem for each example or task.

Where z has a row for each of n examples (hidden states of an equilibrium network) or tasks (adapted
parameters), a step concerns only the rows of its minibatch. `on_rows` hands a solver these alone,
so that directions, tangents and temporaries are those of a minibatch, whatever n is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, BilevelSolver, Method, TrainState


def on_rows(solver: BilevelSolver, key: str, *, recurring: bool = True) -> BilevelSolver:
    """The solver on the minibatch's rows of z and v, every step of an update on the same ones.

    Both losses see z as `[batch, ...]` with `batch[key]` = 0, 1, ..., so that `z[batch[key]]` is
    right here and on all of z. Give the training loop minibatches of the same numbers for both
    losses (`Task(paired=True)`). Rows where `batch["mask"]` is 0 are left as they were. Rows are
    stored in z's dtype and computed with in float32 at least: float16 halves the tables (bfloat16
    too, but XLA's CPU backend writes its rows into a float32 copy of all of the table).

    Args:
        solver: of any method that remembers no rows: SGD for z, no memory of past gradients.
        key: of the minibatches (dicts), int32 [batch], the rows' positions; one occurs once.
        recurring: z and v have a row for each of all n, which goes on where it was left. False:
            one for each place in a minibatch; all start at 0 in every update, and so does what
            the optimisers of z and v remember.

    Returns:
        A solver with `batches` (1, 1), whatever it takes by itself.

    Raises:
        ValueError: from `init`, where the solver remembers something about each row.

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
        index, mask = batch.inner[key], batch.inner.get("mask")
        tables = state.inner_params, state.adjoint
        opt_states = state.inner_opt_state, state.adjoint_opt_state
        if recurring:
            rows = jax.tree.map(lambda leaf: _computed(leaf[index]), tables)
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
            write = lambda leaf, row: _written(leaf, index, row.astype(leaf.dtype), mask)
        else:
            write = lambda leaf, row: row.astype(leaf.dtype)
        z, v = jax.tree.map(write, tables, moved)
        return new.replace(inner_params=z, adjoint=v), info

    return BilevelSolver(init, update, method=solver.method._replace(batches=Method().batches))


def _written(table: jax.Array, index: jax.Array, rows: jax.Array, mask: Any) -> jax.Array:
    """The table with new rows at `index`, but for those of padding."""
    # Padding repeats a row: it would race with the row that it repeats.
    at = index if mask is None else jnp.where(mask > 0, index, len(table))
    return table.at[at].set(rows, mode="drop")


def _computed(leaf: jax.Array) -> jax.Array:
    """In float32 where it is stored in less."""
    short = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if short else leaf


def _repeated(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)
