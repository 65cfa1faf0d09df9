"""The methods: which of the library's solvers each one is, and on which rows of z.

Fresh tasks start at displacement 0 in every update; tasks that recur go on, with their adjoints,
where they were left.
"""

from __future__ import annotations

import optax

import bilevel_flax as bf
from bilevel_flax.solvers import on_rows
from bilevel_flax.solvers.inner_only import inner_only

KEY = "task"  # of a minibatch: each task's position
Transformation = optax.GradientTransformation


def imaml(
    problem: bf.Problem,
    *,
    outer: Transformation,
    inner_rate: float,
    inner_steps: int,
    adjoint_steps: int,
) -> bf.BilevelSolver:
    """Implicit MAML: `inner_steps` of gradient descent from x, then conjugate gradients.

    References:
        A. Rajeswaran, C. Finn, S. Kakade, S. Levine. Meta-learning with implicit gradients.
        NeurIPS 2019.
    """
    solver = bf.implicit(
        problem,
        inner=optax.sgd(inner_rate),
        outer=outer,
        inner_steps=inner_steps,
        adjoint_steps=adjoint_steps,
    )
    return on_rows(solver, KEY, recurring=False)


def tracked(problem: bf.Problem, *, outer: Transformation, inner_rate: float) -> bf.BilevelSolver:
    """One step on z and v at each visit of a task (`soba`), for tasks that recur."""
    return on_rows(bf.soba(problem, inner=optax.sgd(inner_rate), outer=outer), KEY)


def maml(
    problem: bf.Problem, *, outer: Transformation, inner_rate: float, inner_steps: int
) -> bf.BilevelSolver:
    """MAML: backprop through `inner_steps` of gradient descent. First order where G stops x.

    References:
        C. Finn, P. Abbeel, S. Levine. Model-agnostic meta-learning for fast adaptation of deep
        networks. ICML 2017.
    """
    inner = optax.sgd(inner_rate)
    solver = bf.unrolled(problem, inner=inner, outer=outer, inner_steps=inner_steps)
    return on_rows(solver, KEY, recurring=False)


def prototypes(problem: bf.Problem, *, outer: Transformation) -> bf.BilevelSolver:
    """Prototypical networks: nothing adapts, the network is trained as any other."""
    return inner_only(problem, inner=outer)
