"""A Flax `TrainState` whose `tx` is a solver."""

from __future__ import annotations

from typing import Any

from flax.training.train_state import TrainState

from bilevel_flax.base import Batch, Info, PyTree
from bilevel_flax.trainers.optimizer import SolverOptimizer, train_step


def apply_batch(
    state: TrainState, batch: Batch, model_state: PyTree = None
) -> tuple[TrainState, Info] | tuple[TrainState, PyTree, Info]:
    """One step, in the place of `state.apply_gradients(grads=...)`.

    Args:
        state: made with `TrainState.create(apply_fn=..., params=..., tx=solver_optimizer(...))`.
        batch: one training and one validation minibatch.
        model_state: mutable state of a stateful problem (`batch_stats`), which the state, or a
            subclass of it, keeps.

    Returns:
        `(state, info)`; with a `model_state`, `(state, model_state, info)`.

    Raises:
        TypeError: `state.tx` is no solver.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> from flax.training.train_state import TrainState
        >>> from bilevel_flax.trainers import solver_optimizer
        >>> problem = bf.Problem(lambda z, x, b: (z - x) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> tx = solver_optimizer(solver, jnp.array(0.0))
        >>> state = TrainState.create(apply_fn=None, params=jnp.array(1.0), tx=tx)
        >>> state, info = apply_batch(state, bf.Batch(0.0, 1.0))
        >>> float(state.params), int(state.step)
        (0.800000011920929, 1)
    """
    tx: Any = state.tx
    if not isinstance(tx, SolverOptimizer):
        raise TypeError(
            f"state.tx is a {type(tx).__name__}, no solver: "
            "TrainState.create(..., tx=bilevel_flax.trainers.solver_optimizer(solver, x))"
        )
    held: Any = state.opt_state
    params, opt_state, model_state_after, info = train_step(
        tx.solver, state.params, held, batch, model_state
    )
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return (state, info) if model_state is None else (state, model_state_after, info)
