"""MA-SOBA: SOBA with an exponential moving average of the outer direction.

    d_z = D_z        d_v = D_v        d_x <- (1 - θ) d_x + θ D_x

all at the same point and on the same minibatches, d_x = 0 before the first step. Reaches the
optimal rate of SGD, T^-1/2, under plain smoothness.

Departure from the paper: x moves along the average that includes the current minibatch, one step
fresher than the paper's. Rows of per-sample leaves of x are not averaged under a row-sparse
optimiser (`outer.lazy_adam` ...), which keeps averages of its own.

References:
    X. Chen, T. Xiao, K. Balasubramanian. Optimal algorithms for stochastic bilevel optimization
    under relaxed smoothness conditions. JMLR 2024.
"""

from __future__ import annotations

from typing import Any

import optax
from flax import struct

from bilevel_flax.base import BilevelSolver, Estimator, Problem, PyTree
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers.memory import averages as running
from bilevel_flax.solvers.single_loop import single_loop
from bilevel_flax.solvers.soba import directions


@struct.dataclass
class MASOBAState:
    """Attributes: outer: the moving average d_x, a tree of x in float32 at least."""

    outer: PyTree


def estimator(problem: Problem, theta: float, *, lazy: bool = False) -> Estimator:
    """The minibatch directions, the outer one averaged; 4 units."""

    def init(variables):
        return MASOBAState(running.filled(variables.outer, 0.0, problem.per_sample, lazy))

    def update(oracle, variables, batch, state):
        del batch
        found = oracle(variables, combine=directions)
        now = found.directions
        average = running.accumulate(state.outer, 1 - theta, now.outer, theta)
        handed = now._replace(outer=running.handed_on(average, now.outer))
        return handed, MASOBAState(average), found

    return Estimator(init=init, update=update)


def masoba(
    problem: Problem,
    *,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    adjoint: optax.GradientTransformation | None = None,
    theta: float = 0.1,
    inner_weights: Any = None,
    outer_weights: Any = None,
) -> BilevelSolver:
    """MA-SOBA with an Optax optimiser for each variable (4 gradient units a step).

    Args:
        problem: as in `single_loop`, and so are the arguments not listed here.
        inner: optimiser of z.
        outer: optimiser of x.
        adjoint: optimiser of v; None: as `inner`.
        theta: θ in (0, 1], the share of the current minibatch; the paper's is ∝ T^-1/2.
        inner_weights: float [N], shares of the samples; None: equal.
        outer_weights: float [M].

    Raises:
        ValueError: `theta` outside (0, 1].
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta must lie in (0, 1], got {theta!r}")
    return single_loop(
        problem,
        estimator(problem, theta, lazy=isinstance(outer, RowTransformation)),
        inner=inner,
        outer=outer,
        adjoint=adjoint,
        inner_weights=inner_weights,
        outer_weights=outer_weights,
        name="masoba",
    )
