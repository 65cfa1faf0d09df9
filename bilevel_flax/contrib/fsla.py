"""FSLA: z and v as in SOBA, momentum with STORM's correction on x. One loop, one batch a step.

    d_z = D_z        d_v = D_v        d_x <- D_x(u_k) + (1 - η) (d_x - D_x(u_{k-1}))

with D_x at both points u = (z, v, x) on the same minibatches, and d_x = D_x(u_0) at first. Steps
in the source: all ∝ t^-1/2, those of v and z apart (`adjoint` and `inner`).

Rows of per-sample leaves of x are handed on as they are under a row-sparse optimiser.

References:
    J. Li, B. Gu, H. Huang. A fully single loop algorithm for bilevel optimization without Hessian
    inverse. AAAI 2022.
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bilevel_flax.base import BilevelSolver, Estimate, Estimator, Problem, PyTree, Variables
from bilevel_flax.per_sample import takes_rows
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.memory import averages
from bilevel_flax.solvers.single_loop import single_loop
from bilevel_flax.solvers.storm import check_eta


@struct.dataclass
class FSLAState:
    """What the recursion carries.

    Attributes:
        outer: d_x, a tree of x in float32 at least.
        previous: Variables, the point of the step before.
        step: int32 scalar, updates so far.
    """

    outer: PyTree
    previous: Variables
    step: jax.Array


def estimator(problem: Problem, eta: Any, *, lazy: bool = False) -> Estimator:
    """The minibatch directions, the outer one with momentum.

    6 units: at the previous point only D_x is needed, a cross-JVP and a gradient of F (under jit
    the rest of that evaluation is dead code).
    """

    def init(variables):
        zeros = averages.full_like(variables.outer, 0.0, problem.per_sample, lazy)
        return FSLAState(zeros, variables, jnp.int32(0))

    def update(oracle, variables, batch, state):
        del batch
        keep = jnp.where(state.step == 0, 0.0, 1.0 - eta(state.step))
        evaluation = oracle.difference(variables, state.previous, Variables(None, None, keep), lazy)
        change = evaluation.directions
        carried = averages.accumulate(state.outer, keep, change.outer)
        handed = change._replace(outer=averages.cast_like(carried, change.outer))
        handed = averages.in_dtypes_of(variables, handed)
        return Estimate(handed, FSLAState(carried, variables, state.step + 1), evaluation)

    return Estimator(init=init, update=update, units=6.0)


@takes(CommonWithAdjoint)
def fsla(
    problem: Problem, *, eta: float | optax.Schedule = 0.1, **common: Unpack[CommonWithAdjoint]
) -> BilevelSolver:
    """FSLA with an Optax optimiser for each variable (6 gradient units a step).

    Args:
        problem: the bilevel problem.
        eta: η in [0, 1], or a schedule `step -> η`.
        **common: optimisers (v's has steps of its own in the source) and weights, see
            `solvers.keywords`.

    Raises:
        ValueError: `eta` outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.contrib.fsla(problem, eta=0.2, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> solver.method.units
        6.0
    """
    corrected = estimator(problem, check_eta(eta), lazy=takes_rows(common))
    return single_loop(problem, corrected, name="fsla", **common)
