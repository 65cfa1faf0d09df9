"""The library's solvers on tasks that come and go: z has a row for each task of a minibatch.

`on_tasks` hands a solver the rows of the tasks at hand. Fresh tasks start at displacement 0; tasks
that recur go on, with their adjoints, where they were left.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_flax as bf
from bilevel_flax.base import Method


def on_tasks(solver: bf.BilevelSolver, recurring: bool = False) -> bf.BilevelSolver:
    """The solver on the tasks of a minibatch, each step of an update on the same ones.

    Args:
        solver: whose z has a leading axis of tasks. What its optimiser of z remembers starts at 0
            with every task; where they recur it has to remember nothing (SGD).
        recurring: z and v have a row for each of all tasks, read and written at
            `batch.inner["task"]`. False: for each of a minibatch's, and start at 0.
    """

    def update(state, batch):
        index = batch.inner["task"]
        everything = state.inner_params, state.adjoint
        rows = jax.tree.map(
            lambda leaf: leaf[index] if recurring else jnp.zeros_like(leaf), everything
        )
        opt_state = jax.tree.map(jnp.zeros_like, state.inner_opt_state)
        several = [
            tree if count == 1 == max(solver.batches) else _repeated(tree, count)
            for tree, count in zip(batch[:2], solver.batches, strict=True)
        ]
        small = state.replace(inner_params=rows[0], adjoint=rows[1], inner_opt_state=opt_state)
        new, info = solver.update(small, bf.Batch(*several))
        if recurring:
            z, v = jax.tree.map(
                lambda leaf, row: leaf.at[index].set(row),
                everything,
                (new.inner_params, new.adjoint),
            )
            new = new.replace(inner_params=z, adjoint=v)
        return new, info

    method = solver.method._replace(batches=Method().batches)
    return solver._replace(update=update, method=method)


def _repeated(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)


def imaml(
    problem: bf.Problem,
    *,
    outer: optax.GradientTransformation,
    inner_rate: float,
    inner_steps: int,
    adjoint_steps: int,
) -> bf.BilevelSolver:
    """Implicit MAML: `inner_steps` of gradient descent from x, then conjugate gradients.

    References:
        A. Rajeswaran, C. Finn, S. Kakade, S. Levine. Meta-learning with implicit gradients.
        NeurIPS 2019.
    """
    return on_tasks(
        bf.implicit(
            problem,
            inner=optax.sgd(inner_rate),
            outer=outer,
            inner_steps=inner_steps,
            adjoint_steps=adjoint_steps,
        )
    )


def tracked(
    problem: bf.Problem, *, outer: optax.GradientTransformation, inner_rate: float
) -> bf.BilevelSolver:
    """One step on z and v at each visit of a task (`soba`), for tasks that recur."""
    return on_tasks(bf.soba(problem, inner=optax.sgd(inner_rate), outer=outer), recurring=True)


def maml(
    problem: bf.Problem,
    *,
    outer: optax.GradientTransformation,
    inner_rate: float,
    inner_steps: int,
) -> bf.BilevelSolver:
    """MAML: backprop through `inner_steps` of gradient descent. First order where G stops x.

    References:
        C. Finn, P. Abbeel, S. Levine. Model-agnostic meta-learning for fast adaptation of deep
        networks. ICML 2017.
    """
    inner = optax.sgd(inner_rate)
    return on_tasks(bf.unrolled(problem, inner=inner, outer=outer, inner_steps=inner_steps))
