"""Where a diagnostic looks: a point, and what a stateful loss is handed there."""

from __future__ import annotations

from typing import NamedTuple

import jax

from bilevel_flax.base import Problem, PyTree, TrainState, Variables
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.solver import complete_by_state


class Place(NamedTuple):
    """A point with the model state and the key of a stateful problem."""

    variables: Variables
    model_state: PyTree
    rng: jax.Array | None


def place(
    problem: Problem, point: TrainState | Variables, model_state: PyTree, rng: jax.Array | None
) -> Place:
    """What is given, completed by the state where it is one; a fixed key where there is none.

    Args:
        problem: the problem; where it is not stateful there is no key.
        point: a `TrainState` or `Variables`.
        model_state: None: the state's.
        rng: None: the state's.
    """
    check_problem(problem)
    variables, model_state, rng = complete_by_state(point, model_state, rng)
    if not problem.stateful:
        return Place(variables, model_state, None)
    return Place(variables, model_state, jax.random.PRNGKey(0) if rng is None else rng)
