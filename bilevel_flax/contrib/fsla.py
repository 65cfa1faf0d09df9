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

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bilevel_flax.base import BilevelSolver, Estimator, Problem, PyTree, Variables
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers.memory import averages as running
from bilevel_flax.solvers.single_loop import single_loop
from bilevel_flax.solvers.soba import directions
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
        zeros = running.filled(variables.outer, 0.0, problem.per_sample, lazy)
        return FSLAState(zeros, variables, jnp.int32(0))

    def update(oracle, variables, batch, state):
        del batch
        keep = jnp.where(state.step == 0, 0.0, 1.0 - eta(state.step))
        corrected = running.corrected(keep, lazy)

        def combine(now, before):
            return directions(now)._replace(outer=corrected(now, before).outer)

        found = oracle((variables, state.previous), combine=combine)
        now = found.directions
        carried = running.accumulate(state.outer, keep, now.outer)
        handed = now._replace(outer=running.handed_on(carried, now.outer))
        return handed, FSLAState(carried, variables, state.step + 1), found

    return Estimator(init=init, update=update, units=6.0)


def fsla(
    problem: Problem,
    *,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    adjoint: optax.GradientTransformation | None = None,
    eta: float | optax.Schedule = 0.1,
    inner_weights: Any = None,
    outer_weights: Any = None,
) -> BilevelSolver:
    """FSLA with an Optax optimiser for each variable (6 gradient units a step).

    Args:
        problem: as in `single_loop`, and so are the arguments not listed here.
        inner: optimiser of z.
        outer: optimiser of x.
        adjoint: optimiser of v, which has steps of its own in the source; None: as `inner`.
        eta: η in [0, 1], or a schedule `step -> η`.
        inner_weights: float [N], shares of the samples; None: equal.
        outer_weights: float [M].

    Raises:
        ValueError: `eta` outside [0, 1].
    """
    return single_loop(
        problem,
        estimator(problem, check_eta(eta), lazy=isinstance(outer, RowTransformation)),
        inner=inner,
        outer=outer,
        adjoint=adjoint,
        inner_weights=inner_weights,
        outer_weights=outer_weights,
        name="fsla",
    )
