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

from typing import Unpack

from flax import struct

from bilevel_flax.base import BilevelSolver, Estimate, Estimator, Problem, PyTree
from bilevel_flax.per_sample import takes_rows
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.memory import averages
from bilevel_flax.solvers.single_loop import single_loop


@struct.dataclass
class MASOBAState:
    """Attributes: outer: the moving average d_x, a tree of x in float32 at least."""

    outer: PyTree


def estimator(problem: Problem, theta: float, *, lazy: bool = False) -> Estimator:
    """The minibatch directions, the outer one averaged; 4 units."""

    def init(variables):
        return MASOBAState(averages.full_like(variables.outer, 0.0, problem.per_sample, lazy))

    def update(oracle, variables, batch, state):
        del batch
        evaluation = oracle.directions(variables)
        now = evaluation.directions
        average = averages.accumulate(state.outer, 1 - theta, now.outer, theta)
        handed = now._replace(outer=averages.cast_like(average, now.outer))
        return Estimate(handed, MASOBAState(average), evaluation)

    return Estimator(init=init, update=update)


@takes(CommonWithAdjoint)
def masoba(
    problem: Problem, *, theta: float = 0.1, **common: Unpack[CommonWithAdjoint]
) -> BilevelSolver:
    """MA-SOBA with an Optax optimiser for each variable (4 gradient units a step).

    Args:
        problem: the bilevel problem.
        theta: θ in (0, 1], the share of the current minibatch; the paper's is ∝ T^-1/2.
        **common: optimisers and weights, see `solvers.keywords`.

    Raises:
        ValueError: `theta` outside (0, 1].

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.contrib.masoba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> solver.method.units
        4.0
    """
    if not 0 < theta <= 1:
        raise ValueError(f"theta must lie in (0, 1], got {theta!r}")
    average = estimator(problem, theta, lazy=takes_rows(common))
    return single_loop(problem, average, name="masoba", **common)
