"""Estimator + Optax -> BilevelSolver: one shared evaluation, three parallel updates.

An estimator takes the place of `jax.grad`; everything after it is ordinary Optax. All three
directions are taken at the same, old point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks, oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import (
    Batch,
    BilevelSolver,
    Estimator,
    Finite,
    Info,
    Metrics,
    Problem,
    PyTree,
    TrainState,
    Variables,
)
from bilevel_flax.checks import require_ids
from bilevel_flax.minibatches import scaled_problem, share_factors
from bilevel_flax.oracles.evaluate import residual
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers.freezing import frozen_state, muted_unless
from bilevel_flax.solvers.step import learnable, staged, turn, turn_if
from bilevel_flax.tree import norm, ratio

# Each variable and its optimiser's state in a TrainState.
_FIELDS = (
    ("inner_params", "inner_opt_state"),
    ("adjoint", "adjoint_opt_state"),
    ("outer_params", "outer_opt_state"),
)


class _Estimate(NamedTuple):
    """What an estimator makes of a pair of minibatches."""

    directions: Variables
    norms: Variables  # of the directions
    residual: jax.Array  # the adjoint's, relative
    estimator_state: PyTree
    inner_loss: Any
    outer_loss: Any
    metrics: Metrics
    model_state: PyTree


def init_state(
    problem: Problem,
    estimator_init,
    transforms: Variables,
    inner_params: PyTree,
    outer_params: PyTree,
    model_state: PyTree,
    rng: jax.Array | None,
) -> TrainState:
    """A fresh TrainState: v = 0, every leaf a buffer of its own (donation needs that)."""
    checks.parameters("inner_params", inner_params)
    checks.parameters("outer_params", outer_params)
    checks.per_sample(problem, outer_params)
    if problem.stateful and model_state is None:
        model_state = {}
    z, x = checks.copied(inner_params), checks.copied(outer_params)
    v = jax.tree.map(jnp.zeros_like, z)
    by_rows = isinstance(transforms.outer, RowTransformation)
    seen = rows.marked(problem.per_sample, learnable(x)) if by_rows else learnable(x)
    points = (learnable(z), learnable(z), seen)
    states = [t.init(point) for t, point in zip(transforms, points, strict=True)]
    rng = jax.random.PRNGKey(0) if rng is None else jnp.array(rng, copy=True)
    state = TrainState(
        step=jnp.int32(0),
        inner_params=z,
        adjoint=v,
        outer_params=x,
        inner_opt_state=checks.copied(states[0]),
        adjoint_opt_state=checks.copied(states[1]),
        outer_opt_state=checks.copied(states[2]),
        estimator_state=checks.copied(estimator_init(Variables(z, v, x))),
        model_state=checks.copied(model_state),
        rng=rng,
    )
    return state


def single_loop(
    problem: Problem,
    estimator: Estimator,
    *,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    adjoint: optax.GradientTransformation | None = None,
    inner_weights: Any = None,
    outer_weights: Any = None,
    name: str = "",
) -> BilevelSolver:
    """Combines an estimator of the three directions with an Optax optimiser for each variable.

    Args:
        problem: the bilevel problem.
        estimator: turns oracle calls into directions.
        inner: optimiser of z, fed D_z = ∇₁G.
        outer: optimiser of x, fed D_x. Per-sample leaves reach it as `Rows` if it is row-sparse
            (`outer.lazy_adam` ...), dense otherwise.
        adjoint: optimiser of v, fed D_v = ∇²₁₁G v + ∇₁F; None: as `inner`. It is called with the
            extra arguments `inner_opt_state`, `inner_direction` (D_z) and `inner_params`, all of
            before the step, so that a preconditioner can be shared (`adjoint.like_inner`), and
            `adjoint_residual`, so that damping can follow it (`adjoint.self_damped`).
        inner_weights: float [N], each inner minibatch's share of the samples, summing to 1
            (`FiniteSum.weights`); None: equal. Needs `batch.inner_id`.
        outer_weights: float [M], the same for the outer data. Needs `batch.outer_id`.
        name: the method's name, for logs.

    Returns:
        A `BilevelSolver` that takes one inner and one outer minibatch a step. When a direction
        is not finite the state stays as it was and `info.finite` tells which one.

    Raises:
        ValueError: weights that are no shares; at trace time ids missing from a batch, an outer
            leaf that the inner loss never uses, or whatever the oracles refuse.
    """
    transforms = Variables(
        *(optax.with_extra_args_support(t) for t in (inner, adjoint or inner, outer))
    )
    sparse_outer = isinstance(outer, RowTransformation)
    scale_inner = share_factors("inner_weights", inner_weights)
    scale_outer = share_factors("outer_weights", outer_weights)

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        return init_state(
            problem, estimator.init, transforms, inner_params, outer_params, model_state, rng
        )

    needed = {
        "inner": estimator.needs_ids or scale_inner is not None,
        "outer": estimator.needs_ids or scale_outer is not None,
    }

    def keys(state: TrainState, batch: Batch):
        if not problem.stateful:
            return None, None
        seeds = (batch.inner_id, batch.outer_id) if estimator.fixed_keys else (state.step,) * 2
        return tuple(
            None if seed is None else jax.random.fold_in(jax.random.fold_in(state.rng, side), seed)
            for side, seed in enumerate(seeds)
        )

    def oracle_on(state: TrainState, batch: Batch, exact_residual: bool = True):
        rngs = keys(state, batch)
        by_inner = by_outer = jnp.float32(1.0)
        shared = problem
        if scale_inner is not None and batch.inner is not None:
            by_inner = scale_inner[batch.inner_id]
            shared = scaled_problem(shared, by_inner, "inner")
        if scale_outer is not None and batch.outer is not None:
            by_outer = scale_outer[batch.outer_id]
            shared = scaled_problem(shared, by_outer, "outer")

        def oracle(
            variables: Any, evaluate=oracles.evaluate_all, combine=None
        ) -> oracles.Evaluation:
            points = (variables,) if isinstance(variables, Variables) else variables
            context = (batch, state.model_state, rngs)
            if shared.distributed is None or evaluate is oracles.evaluate_linear:
                several = [evaluate(shared, point, *context) for point in points]
                found = several[0]
                if combine is not None:
                    combined = combine(*(each.oracles for each in several))
                    found = found._replace(directions=combined)
            else:
                found, lengths = shared.distributed(
                    shared, evaluate, points, *context, combine, exact_residual, state.step
                )
                if lengths is not None:
                    found = found._replace(residual=ratio(*lengths))
            if found.inner_loss is not None:
                found = found._replace(inner_loss=found.inner_loss / by_inner)
            if found.outer_loss is not None:
                found = found._replace(outer_loss=found.outer_loss / by_outer)
            return found

        return oracle

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Info]:
        require_ids(batch, name, needed)
        rng = keys(state, batch)[0]
        checks.outer_is_used(problem, state.variables, batch, state.model_state, rng)
        exact = problem.distributed is None or reads_residual(transforms.adjoint, state)
        oracle = oracle_on(state, batch, exact)

        def evaluate(estimate):
            directions, memory, found = estimate(
                oracle, state.variables, batch, state.estimator_state
            )
            return _Estimate(
                directions,
                Variables(*(norm(direction) for direction in directions)),
                residual(found.oracles) if found.residual is None else found.residual,
                memory,
                found.inner_loss,
                found.outer_loss,
                found.metrics,
                found.model_state if problem.stateful else state.model_state,
            )

        if estimator.less:
            assert estimator.stage is not None
            due = estimator.stage(state.estimator_state)
            found, (_, *moves) = staged(evaluate, (*estimator.less, estimator.update), due)
        else:
            found, moves = evaluate(estimator.update), (None, None)
        finite = Finite(*(jnp.isfinite(value) for value in found.norms))
        alive = finite.inner & finite.adjoint & finite.outer

        d_z, _, d_x = found.directions
        d_x = muted_unless(alive, d_x) if sparse_outer else rows.densify(d_x, state.outer_params)
        curvature = {"outer_params": state.outer_params}  # x shapes G's curvature in z and v
        extra = {
            "inner_opt_state": state.inner_opt_state,
            "inner_direction": learnable(d_z),
            "inner_params": learnable(state.inner_params),
            "adjoint_residual": found.residual,
            **curvature,
        }
        fresh = state.replace(
            step=state.step + 1,
            estimator_state=found.estimator_state,
            model_state=found.model_state,
        )
        parts = zip(
            _FIELDS,
            (None, *moves),
            transforms,
            found.directions._replace(outer=d_x),
            (curvature, extra, {}),
            strict=True,
        )
        settled = {}
        for fields, now, transform, direction, more in parts:
            point, opt_state = (getattr(state, field) for field in fields)
            args = (transform, direction, opt_state, point, more)
            if now is None:
                fresh = fresh.replace(**dict(zip(fields, turn(*args), strict=True)))
            else:
                settled |= zip(fields, turn_if(now & alive, *args), strict=True)
        info = Info(
            inner_loss=found.inner_loss,
            outer_loss=found.outer_loss,
            norms=found.norms,
            finite=finite,
            adjoint_residual=found.residual,
            oracle_units=jnp.float32(estimator.units),
            metrics=found.metrics,
        )
        return frozen_state(alive, fresh, state, d_x).replace(**settled), info

    def refresh(state: TrainState, batch: Batch) -> TrainState:
        require_ids(batch, name, needed)
        assert estimator.refresh is not None
        oracle = oracle_on(state, batch)
        memory = estimator.refresh(oracle, state.variables, batch, state.estimator_state)
        return state.replace(estimator_state=memory)

    solver = BilevelSolver(init, update, units=estimator.units, name=name)
    if estimator.refresh is None:
        return solver
    assert estimator.next_refresh is not None and estimator.refresh_cursor is not None
    next_refresh, refresh_cursor = estimator.next_refresh, estimator.refresh_cursor
    return solver._replace(
        refresh=refresh,
        next_refresh=lambda state: next_refresh(state.estimator_state),
        refresh_cursor=lambda state: refresh_cursor(state.estimator_state),
        refresh_units=estimator.refresh_units,
    )


def reads_residual(adjoint: optax.GradientTransformationExtraArgs, state: TrainState) -> bool:
    """Whether the optimiser of v makes use of `adjoint_residual`; nothing is computed."""
    z, v = learnable(state.inner_params), learnable(state.adjoint)

    def update(residual):
        return adjoint.update(
            v,
            state.adjoint_opt_state,
            v,
            inner_opt_state=state.inner_opt_state,
            inner_direction=z,
            inner_params=z,
            adjoint_residual=residual,
            outer_params=state.outer_params,
        )

    return oracles.uses(update, jnp.float32(1.0))[0]
