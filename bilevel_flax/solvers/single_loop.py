"""Estimator + Optax -> BilevelSolver: one shared evaluation, three parallel updates.

An estimator takes the place of `jax.grad`; everything after it is ordinary Optax. All three
directions are taken at the same, old point.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax.base import (
    Batch,
    BilevelSolver,
    Estimator,
    Info,
    Method,
    Problem,
    PyTree,
    TrainState,
    Variables,
)
from bilevel_flax.oracles.evaluate import Evaluation
from bilevel_flax.oracles.oracle import Oracle
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers.adjoint_optimisers import like_inner_optimizer
from bilevel_flax.solvers.binder import Binder
from bilevel_flax.solvers.constraints import without_held
from bilevel_flax.solvers.initial_state import init_state
from bilevel_flax.solvers.inner_optimiser import check_value, trainable
from bilevel_flax.solvers.optimiser_probes import coupled_decay
from bilevel_flax.solvers.step import (
    all_finite,
    make_info,
    move_outer,
    norms_and_finite,
    optimizer_step,
    rollback_unless_finite,
    tolerant,
    updated,
)
from bilevel_flax.tree import dot, filter_inexact, masked, norm, plus_decay


def single_loop(
    problem: Problem,
    estimator: Estimator,
    *,
    inner: optax.GradientTransformation | None,
    outer: optax.GradientTransformation,
    adjoint: optax.GradientTransformation | None = None,
    inner_weights: Any = None,
    outer_weights: Any = None,
    name: str = "",
) -> BilevelSolver:
    """A solver from an estimator and one optimiser for each variable.

    Args:
        problem: the bilevel problem.
        estimator: turns oracle calls into directions.
        inner: as in `common.Common`, and so are the arguments that follow.
        outer: optimiser of x.
        adjoint: optimiser of v; None: as `inner`.
        inner_weights: float [N], shares of the samples; None: equal.
        outer_weights: float [M].
        name: the method's name, for logs.

    Returns:
        A `BilevelSolver` that takes one inner and one outer minibatch a step. When a direction
        is not finite the state stays as it was and `info.finite` tells which one.

    Raises:
        ValueError: weights that are no shares; no `adjoint` where `inner` is None; at trace time
            ids missing from a batch, an outer leaf that the inner loss never uses, or whatever the
            oracles refuse.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> from bilevel_flax.base import Estimate
        >>> def update(oracle, variables, batch, mean):  # SOBA with a running mean of D_x
        ...     evaluation = oracle.directions(variables)
        ...     mean = 0.9 * mean + 0.1 * evaluation.directions.outer
        ...     return Estimate(evaluation.directions._replace(outer=mean), mean, evaluation)
        >>> estimator = bf.Estimator(init=lambda variables: 0.0 * variables.outer, update=update)
        >>> solver = bf.single_loop(
        ...     problem, estimator, inner=optax.sgd(0.1), outer=optax.sgd(0.1), name="mine"
        ... )
        >>> state = solver.init(jnp.array(0.0), jnp.array(0.0))
        >>> state, info = solver.update(state, bf.Batch(1.0, 1.0))
    """
    checks.problem(problem)
    checks.host_moves_z(inner, adjoint)
    moves_z = optax.set_to_zero() if inner is None else inner
    for optimiser, value in (("inner", moves_z), ("outer", outer), ("adjoint", adjoint or inner)):
        checks.optimizer(optimiser, value)
    tx = Variables(
        tolerant(moves_z),
        like_inner_optimizer(moves_z) if adjoint is None else tolerant(adjoint),
        tolerant(outer),
    )
    binder = Binder(problem, estimator, inner_weights, outer_weights, name)

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        return init_state(problem, estimator.init, tx, inner_params, outer_params, model_state, rng)

    def moving(state: TrainState) -> PyTree:
        return trainable(tx.inner, state.inner_opt_state, *state.variables[::2])

    def free(oracle: Oracle, state: TrainState) -> Oracle:
        z, _, x = state.variables
        gradient = lambda: oracle.inner_value_and_grad(z, x)[1]
        flags = without_held(oracle.trainable, tx.inner, state.inner_opt_state, z, x, gradient)
        return dataclasses.replace(oracle, trainable=flags)

    def at_hosts_z(state: TrainState, inner_params: PyTree) -> TrainState:
        if inner_params is None:
            return state
        checks.hosts_z(inner, inner_params, state)
        return state.replace(inner_params=inner_params)

    def update(
        state: TrainState, batch: Batch, inner_params: PyTree = None
    ) -> tuple[TrainState, Info]:
        """One shared evaluation, three parallel Optax steps, all from the old point."""
        state = at_hosts_z(state, inner_params)
        check_value(problem, tx.inner, state.inner_opt_state, *state.variables[::2])
        flags = moving(state)
        decay = coupled_decay(tx.inner, state.inner_opt_state, *state.variables[::2])
        oracle = free(binder.step(state, batch, flags, decay), state)
        # Of what has come to rest v says nothing any more.
        state = state.replace(adjoint=masked(state.adjoint, oracle.trainable))
        estimate = estimator.update(oracle, state.variables, batch, state.estimator_state)
        evaluation, active = estimate.evaluation, estimate.active
        norms, finite = norms_and_finite(estimate)
        alive = all_finite(finite)
        # What may rest is a loop's carry: a NaN is kept out of it, for there is no way back.
        awake = Variables(*(None if moves is None else moves & alive for moves in active))

        d_z, d_v, d_x = estimate.directions
        z, v, x = state.variables
        about_z = inner_extra_args(oracle, evaluation, state, d_z)
        about_v = adjoint_extra_args(evaluation, state, estimate.directions, norms)
        new_z, z_opt = z, state.inner_opt_state
        if inner is not None:
            args = tx.inner, d_z, z_opt, z, awake.inner, alive
            new_z, z_opt = optimizer_step(*args, **about_z)
        args = tx.adjoint, d_v, state.adjoint_opt_state, v, awake.adjoint, alive
        new_v, v_opt = optimizer_step(*args, **about_v)
        about_x = outer_extra_args(evaluation, state, new_z, plus_decay(d_z, decay, z))
        new_x, x_opt, d_x = move_outer(tx.outer, d_x, alive, state, awake.outer, **about_x)

        new = state.replace(
            step=state.step + 1,
            inner_params=new_z,
            adjoint=new_v,
            outer_params=new_x,
            inner_opt_state=z_opt,
            adjoint_opt_state=v_opt,
            outer_opt_state=x_opt,
            estimator_state=estimate.state,
            model_state=evaluation.model_state if problem.stateful else state.model_state,
        )
        info = make_info(evaluation, norms, finite, estimator.units)
        taken = True, True, active.outer is not None or not isinstance(tx.outer, RowTransformation)
        return rollback_unless_finite(finite, new, updated(new, state, taken), d_x), info

    method = Method(name, estimator.units)
    if estimator.full_pass is None:
        return BilevelSolver(init, update, method=method)
    full_pass = estimator.full_pass

    def refresh(state: TrainState, batch: Batch, inner_params: PyTree = None) -> TrainState:
        state = at_hosts_z(state, inner_params)
        oracle = binder.part(state, batch, moving(state))
        memory = full_pass.update(oracle, state.variables, batch, state.estimator_state)
        return state.replace(estimator_state=memory)

    return BilevelSolver(
        init,
        update,
        refresh,
        lambda state: full_pass.due(state.estimator_state),
        lambda state: full_pass.cursor(state.estimator_state),
        method._replace(refresh_units=full_pass.units),
    )


def inner_extra_args(oracle: Oracle, evaluation: Evaluation, state: TrainState, d_z: Any) -> dict:
    """What z's optimiser may ask for, by the names that Optax gives these things."""
    return {
        "value": evaluation.inner_loss,
        "grad": filter_inexact(d_z),
        "value_fn": lambda z: oracle.inner_value_and_grad(z, state.outer_params)[0],
        "grad_fn": lambda z, _: oracle.inner_value_and_grad(z, state.outer_params)[1],
        "outer_params": state.outer_params,  # x shapes G's curvature in z
    }


def adjoint_extra_args(
    evaluation: Evaluation, state: TrainState, directions: Variables, norms: Variables
) -> dict:
    """What v's optimiser may ask for; all of it from before the step."""
    return {
        "direction_length": norms.adjoint,
        "inner_opt_state": state.inner_opt_state,
        "inner_direction": filter_inexact(directions.inner),
        "inner_params": filter_inexact(state.inner_params),
        "adjoint_residual": evaluation.residual,
        "adjoint_product": evaluation.product,
        "value": evaluation.inner_loss,
        "grad": filter_inexact(directions.adjoint),
        "outer_params": state.outer_params,
    }


def outer_extra_args(evaluation: Evaluation, state: TrainState, new_inner: Any, d_z: Any) -> dict:
    """What x's optimiser may ask for: how z moves in this step, and what x does to it."""
    z, v, new, d_z = (filter_inexact(tree) for tree in (*state.variables[:2], new_inner, d_z))
    return {
        "value": evaluation.outer_loss,
        "adjoint_product": evaluation.product,
        "adjoint_length": norm(v),
        "inner_step_along_adjoint": dot(v, jax.tree.map(jnp.subtract, new, z)),
        "inner_gradient_along_adjoint": dot(v, d_z),
        "through_inner": evaluation.through_inner,
    }
