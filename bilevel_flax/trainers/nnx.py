"""An `nnx.Optimizer` whose transformation is a solver."""

from __future__ import annotations

from typing import Any

from flax import nnx

from bilevel_flax.base import Batch, Info
from bilevel_flax.nnx.modules import filled, plain, template_of
from bilevel_flax.trainers.optimizer import SolverOptimizer, train_step


def update(model: nnx.Module, optimizer: nnx.Optimizer, batch: Batch) -> Info:
    """One step of the solver, written into `model` and `optimizer`, inside or outside of `nnx.jit`.

    The problem is one of `bf.nnx.problem`, with the optimiser's `wrt`: parameters that are not
    trained, and all other variables, are its model state.

    Args:
        model: the module.
        optimizer: `nnx.Optimizer(model, solver_optimizer(solver, x), wrt=...)`; x is
            `optimizer.opt_state.outer_params`.
        batch: one training and one validation minibatch.

    Raises:
        TypeError: the optimiser's transformation is no solver.
    """
    tx: Any = optimizer.tx
    if not isinstance(tx, SolverOptimizer):
        raise TypeError(
            f"optimizer.tx is a {type(tx).__name__}, no solver: "
            "nnx.Optimizer(model, bilevel_flax.trainers.solver_optimizer(solver, x), wrt=...)"
        )
    rest = template_of(model, optimizer.wrt).rest
    params, opt_state, model_state, info = train_step(
        tx.solver,
        nnx.as_pure(nnx.state(model, optimizer.wrt)),
        nnx.as_pure(optimizer.opt_state),
        batch,
        plain(rest),
    )
    nnx.update(model, params)
    nnx.update(model, filled(rest, model_state))
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
    optimizer.step[...] += 1
    return info
