"""The state that a run starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax import checks
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Problem, PyTree, TrainState, Variables
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers import lookahead
from bilevel_flax.tree import copied, filter_inexact, zeros_like


def init_state(
    problem: Problem,
    estimator_init: Callable[[Variables], PyTree],
    transforms: Variables,
    inner_params: PyTree,
    outer_params: PyTree,
    model_state: PyTree,
    rng: jax.Array | None,
) -> TrainState:
    """A fresh TrainState: v = 0, every leaf a buffer of its own (donation needs that)."""
    z, x = (lookahead.fast_of(params) for params in (inner_params, outer_params))
    point, model_state, rng = init_variables(problem, z, x, model_state, rng)
    z, v, x = point
    by_rows = isinstance(transforms.outer, RowTransformation)
    x_floats = filter_inexact(x)
    x_floats = rows.marked(problem.per_sample, x_floats) if by_rows else x_floats
    points = (filter_inexact(z), filter_inexact(z), x_floats)
    states = [t.init(point) for t, point in zip(transforms, points, strict=True)]
    states[0] = lookahead.started("inner", states[0], inner_params)
    states[2] = lookahead.started("outer", states[2], outer_params)
    return TrainState(
        step=jnp.int32(0),
        inner_params=z,
        adjoint=v,
        outer_params=x,
        inner_opt_state=copied(states[0]),
        adjoint_opt_state=copied(states[1]),
        outer_opt_state=copied(states[2]),
        estimator_state=copied(estimator_init(point)),
        model_state=model_state,
        rng=rng,
    )


def init_variables(
    problem: Problem, inner_params: PyTree, outer_params: PyTree, model_state: PyTree, rng: Any
) -> tuple[Variables, PyTree, jax.Array]:
    """`((z, 0, x), model_state, rng)`, checked, every leaf a buffer of its own."""
    checks.key("rng", rng)
    checks.parameters("inner_params", inner_params)
    checks.parameters("outer_params", outer_params)
    checks.per_sample(problem, outer_params)
    if problem.stateful and model_state is None:
        model_state = {}
    z = copied(inner_params)
    rng = jax.random.PRNGKey(0) if rng is None else jnp.array(rng, copy=True)
    point = Variables(z, zeros_like(z), copied(outer_params))
    return point, copied(model_state), rng
