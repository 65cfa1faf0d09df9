"""STORM-type momentum on all three directions, on one pair of minibatches a step.

    d_k = D_B(u_k) + (1 - η) (d_{k-1} - D_B(u_{k-1}))        d_0 = D_B(u_0)

for each of z, v and x, u = (z, v, x): an average that is corrected for the move of the point.
η = 1 is SOBA, η = 0 SARAH's recursion without restarts. Neither tables nor full passes.
Published steps: ρ, γ ∝ t^-1/3 and η ∝ t^-2/3.

Rows of per-sample leaves of x are handed on as they are under a row-sparse optimiser.

References:
    A. Cutkosky, F. Orabona. Momentum-based variance reduction in non-convex SGD. NeurIPS 2019.
    J. Yang, K. Ji, Y. Liang. Provably faster algorithms for bilevel optimization. NeurIPS 2021
    (MRBO, which has it on z and, with a nested Neumann series, on x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bilevel_flax.base import BilevelSolver, Estimate, Estimator, Problem, Variables
from bilevel_flax.per_sample import takes_rows
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.memory import averages
from bilevel_flax.solvers.single_loop import single_loop


@struct.dataclass
class STORMState:
    """What the recursion carries.

    Attributes:
        directions: Variables, in float32 at least.
        previous: Variables, the point of the step before.
        step: int32 scalar, updates so far.
    """

    directions: Variables
    previous: Variables
    step: jax.Array


def check_eta(eta: Any) -> Callable[[Any], Any]:
    """η as a schedule.

    Raises:
        ValueError: a constant outside [0, 1].
    """
    if callable(eta):
        return eta
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] or be a schedule step -> eta, got {eta!r}")
    return lambda step: eta


def estimator(problem: Problem, eta: Callable, *, lazy: bool = False) -> Estimator:
    """The corrected average of all three directions; 8 units, two points a step."""

    def init(variables):
        zeros = averages.start(variables, 0.0, problem.per_sample, lazy)
        return STORMState(zeros, variables, jnp.int32(0))

    def update(oracle, variables, batch, state):
        del batch
        keep = jnp.where(state.step == 0, 0.0, 1.0 - eta(state.step))
        evaluation = oracle.difference(variables, state.previous, keep, lazy)
        change = evaluation.directions
        carried = averages.accumulate(state.directions, keep, change)
        state = STORMState(carried, variables, state.step + 1)
        handed = averages.in_dtypes_of(variables, averages.cast_like(carried, change))
        return Estimate(handed, state, evaluation)

    return Estimator(init=init, update=update, units=8.0)


@takes(CommonWithAdjoint)
def storm(
    problem: Problem, *, eta: float | optax.Schedule = 0.1, **common: Unpack[CommonWithAdjoint]
) -> BilevelSolver:
    """STORM momentum with an Optax optimiser for each variable (8 gradient units a step).

    Args:
        problem: the bilevel problem.
        eta: η in [0, 1], or a schedule `step -> η`.
        **common: optimisers and weights, see `solvers.keywords`.

    Raises:
        ValueError: `eta` outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.storm(problem, eta=0.2, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> solver.method.units
        8.0
    """
    recursion = estimator(problem, check_eta(eta), lazy=takes_rows(common))
    return single_loop(problem, recursion, name="storm", **common)
