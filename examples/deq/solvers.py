"""Where z and v live: a row for each training example, or for each place in a minibatch."""

from __future__ import annotations

import optax

import bilevel_flax as bf
from bilevel_flax import contrib
from bilevel_flax.solvers import on_rows

KEY = "state"  # of a minibatch: each example's row of z


def tracked(problem: bf.Problem, *, outer: optax.GradientTransformation) -> bf.BilevelSolver:
    """Each example's z and v go on where they were left, one condition a visit (`soba`)."""
    return on_rows(bf.soba(problem, inner=optax.sgd(1.0), outer=outer), KEY)


def solved(
    problem: bf.Problem,
    *,
    outer: optax.GradientTransformation,
    inner_steps: int,
    adjoint_steps: int,
) -> bf.BilevelSolver:
    """Fixed point and adjoint (GMRES) of a minibatch, from what the one before left (`bsg`)."""
    return contrib.bsg(
        problem,
        inner=optax.sgd(1.0),
        outer=outer,
        inner_steps=inner_steps,
        adjoint_steps=adjoint_steps,
    )
