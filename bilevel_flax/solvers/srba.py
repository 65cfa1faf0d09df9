"""SRBA: SARAH on the three directions of a bilevel problem. Constant steps, no table.

Every `period` steps the full directions are computed, by a chunked pass over all minibatches
(`refresh`); in between, on one inner and one outer minibatch B at two points u = (z, v, x),

    d_k = d_{k-1} + D_B(u_k) - D_B(u_{k-1})

so that E[d_k] = D(u_k) - D(u_{k-1}) + d_{k-1} (d_k is not unbiased given the past). At the step of
a full pass both points are the same, and d_k is the full direction. Published steps: constant
∝ (n + m)^-1/2, period about (n + m) / batch size; O((n + m)^1/2 / ε) calls, which is optimal.

Departure from the paper: its analysis projects v on a ball; here nothing is projected (clip v in
the `adjoint` optimiser if need be).

Memory: the directions and the previous point, 3p + 2d floats beside the solver's own. Rows of
per-sample leaves of x are handed on as they are under a row-sparse optimiser (`outer.lazy_adam`
...): each lives in one minibatch, so its value is exact at the moment of the visit.

References:
    M. Dagréou, T. Moreau, S. Vaiter, P. Ablin. A lower bound and a near-optimal algorithm for
    bilevel empirical risk minimization. AISTATS 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import struct

from bilevel_flax.base import BilevelSolver, Estimate, Estimator, FullPass, Problem, Variables
from bilevel_flax.checks import check_count, check_sum
from bilevel_flax.per_sample import takes_rows
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.memory import averages
from bilevel_flax.solvers.single_loop import single_loop


@struct.dataclass
class SARAHState:
    """What SARAH's recursion carries.

    Attributes:
        directions: Variables; while a full pass is under way, its partial sums.
        previous: Variables, the point of the step before.
        cursor: int32 scalar, minibatches of the full pass that are done, 0 if none is under way.
        step: int32 scalar, updates so far.
        next_refresh: int32 scalar, the step before which the next full pass is due.
    """

    directions: Variables
    previous: Variables
    cursor: jax.Array
    step: jax.Array
    next_refresh: jax.Array


def estimator(
    problem: Problem,
    num_inner_batches: int,
    num_outer_batches: int,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    lazy: bool = False,
) -> Estimator:
    """SARAH's recursion, restarted by full passes.

    Args:
        problem: the problem.
        num_inner_batches: N.
        num_outer_batches: M.
        schedule: `schedule(step) -> int32`, the step of the full pass that follows one at `step`.
        lazy: whether the outer optimiser takes `Rows` as they are.
    """

    def init(variables):
        # Infinite until the first full pass: a loop that leaves it out must not run on.
        unknown = averages.start(variables, jnp.inf, problem.per_sample, lazy)
        return SARAHState(unknown, variables, jnp.int32(0), jnp.int32(0), jnp.int32(0))

    def update(oracle, variables, batch, state):
        del batch
        evaluation = oracle.difference(variables, state.previous, lazy=lazy)
        change = evaluation.directions
        # Partial sums of an unfinished pass are no directions.
        whole = jnp.where(state.cursor == 0, 1.0, jnp.nan)
        carried = averages.accumulate(state.directions, whole, change)
        state = state.replace(directions=carried, previous=variables, step=state.step + 1)
        return Estimate(averages.cast_like(carried, change), state, evaluation)

    def refresh(oracle, variables, batch, state):
        oracles = oracle.at(variables).oracles
        first = state.cursor == 0
        sums = jax.tree.map(lambda leaf: jnp.where(first, 0, leaf), state.directions)
        z, v, x = sums
        # One sum has no memory of what it holds: minibatches of the other side spoil it.
        right_side = (state.cursor < num_inner_batches) == (batch.inner is not None)
        one = jnp.where(right_side, 1.0, jnp.nan)
        if batch.inner is not None:
            share = _if_within(batch.inner_id, num_inner_batches, one / num_inner_batches)
            z = averages.accumulate(z, 1.0, oracles.inner_grad, share)
            v = averages.accumulate(v, 1.0, oracles.hvp, share)
            x = averages.accumulate(x, 1.0, oracles.cross_jvp, share)
        else:
            share = _if_within(batch.outer_id, num_outer_batches, one / num_outer_batches)
            v = averages.accumulate(v, 1.0, oracles.outer_grad_inner, share)
            x = averages.accumulate(x, 1.0, oracles.outer_grad_outer, share)
        done = state.cursor + 1 == num_inner_batches + num_outer_batches
        return SARAHState(
            directions=Variables(z, v, x),
            previous=jax.tree.map(
                lambda point, old: jnp.where(done, point, old), variables, state.previous
            ),
            cursor=jnp.where(done, 0, state.cursor + 1),
            step=state.step,
            next_refresh=jnp.where(done, schedule(state.step), state.next_refresh),
        )

    return Estimator(
        init=init,
        update=update,
        full_pass=FullPass(refresh, lambda state: state.next_refresh, lambda state: state.cursor),
        units=8.0,
        needs_ids=problem.stateful,
    )


def _if_within(position: Any, count: int, share: jax.Array) -> jax.Array:
    """The share of a minibatch; NaN where it is given an id that there is not."""
    if position is None:
        return share
    return jnp.where((jnp.asarray(position) >= 0) & (position < count), share, jnp.nan)


@takes(CommonWithAdjoint)
def srba(
    problem: Problem,
    *,
    num_inner_batches: int,
    num_outer_batches: int,
    period: int,
    **common: Unpack[CommonWithAdjoint],
) -> BilevelSolver:
    """SRBA with an Optax optimiser for each variable (8 gradient units a step).

    Args:
        problem: a finite sum: what the losses give on a minibatch depends on (z, x) and its id
            only (BatchNorm, dropout and random augmentation break this; a warning says so).
        num_inner_batches: N, minibatches of the inner data.
        num_outer_batches: M, minibatches of the outer data.
        period: steps from one full pass to the next, >= 1; N + M times .5 to a few.
        **common: optimisers and weights, see `solvers.keywords`.

    Returns:
        A `BilevelSolver` whose `refresh` must be run over all minibatches whenever
        `next_refresh(state) <= state.step`, before the first step too (until then the directions
        are not finite and nothing moves, and so after a pass with a minibatch of the other side or
        an id that there is not).

    Raises:
        ValueError: `period` or a number of minibatches below 1, weights of another length.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x - batch) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> data = jnp.array([[-1.0], [1.0]])
        >>> solver = bf.srba(
        ...     problem, inner=optax.sgd(0.3), outer=optax.sgd(0.1),
        ...     num_inner_batches=2, num_outer_batches=2, period=4,
        ... )
        >>> state = solver.init(jnp.zeros(1), jnp.ones(1))
        >>> refresh, update = jax.jit(solver.refresh), jax.jit(solver.update)
        >>> for step in range(400):
        ...     if solver.next_refresh(state) <= state.step:
        ...         for i in range(2):
        ...             state = refresh(state, bf.Batch(inner=data[i], inner_id=i))
        ...         for j in range(2):
        ...             state = refresh(state, bf.Batch(outer=5 + data[j], outer_id=j))
        ...     i, j = step % 2, step // 2 % 2
        ...     state, info = update(state, bf.Batch(data[i], 5 + data[j], i, j))
        >>> round(float(state.outer_params[0]), 4)
        5.0
    """
    check_sum(problem, "srba", num_inner_batches, num_outer_batches, common)
    check_count("period", period)
    recursion = estimator(
        problem,
        num_inner_batches,
        num_outer_batches,
        lambda step: step + period,
        lazy=takes_rows(common),
    )
    return single_loop(problem, recursion, name="srba", **common)
