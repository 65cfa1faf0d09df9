"""SABA: SAGA on each of the five quantities of a bilevel problem. Constant steps suffice.

Each of ∇₁G, ∇²₁₁G v and ∇²₂₁G v over the N inner minibatches, and of ∇₁F and ∇₂F over the M outer
ones, goes through a SAGA memory of its own (`memory.saga`). With S[new_i] = new_i - mem[i] + mean
the directions at (z, v, x) are

    D_z = S[∇₁G_i]      D_v = S[∇²₁₁G_i v] + S[∇₁F_j]      D_x = S[∇²₂₁G_i v] + S[∇₂F_j]

They are unbiased, and their variance vanishes at the solution. Rates with constant steps:
O((n + m)^2/3 / T), linear under a Polyak-Lojasiewicz inequality.

Memory: tables of [N, p] for ∇₁G and Hv and [M, p] for ∇₁F, with p the size of z, and of [N, d] and
[M, d] for the d shared coordinates of x.

Per-sample leaves of x need no table. Row r lives in one minibatch, so with m[r] its last cross
term the full direction at r is m[r] / N: one vector [n] is table and mean at once. A row of
minibatch i gets new - m[r] + m[r] / N, any other row m[r] / N. Under a row-sparse optimiser
(`outer.lazy_adam` ...) only the rows of the minibatch move, by a value that is exact at the
moment of the visit (the derivative of the only component that has the row), so there is nothing
to reduce: they are handed on as they are, without any memory.

References:
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms. NeurIPS 2022, Algorithm 3.
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import struct

from bilevel_flax import per_sample as rows
from bilevel_flax.base import (
    NEVER,
    Batch,
    BilevelSolver,
    Estimate,
    Estimator,
    FullPass,
    Oracles,
    Problem,
    PyTree,
)
from bilevel_flax.checks import check_sum
from bilevel_flax.oracles.evaluate import evaluate_all
from bilevel_flax.oracles.oracle import directions
from bilevel_flax.oracles.residual_codes import evaluate_linear, plus
from bilevel_flax.per_sample import takes_rows
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.memory import averages, residual_codes, saga, tables
from bilevel_flax.solvers.single_loop import single_loop

_TABLE_DTYPES = tuple(jnp.dtype(name) for name in ("bfloat16", "float32", "float64"))


@struct.dataclass
class SABAState:
    """SABA's memory.

    Attributes:
        inner: of rows Oracles(inner_grad, hvp, cross_jvp, None, None), N of them.
        outer: of rows Oracles(None, None, None, outer_grad_inner, outer_grad_outer), M of them.
        per_sample: tree of x, [n, ...] at per-sample leaves, else None: each row's last cross term.
        cursor: int32 scalar, minibatches of the initial full pass that are done.
        next_refresh: int32 scalar, 0 while an initial full pass is due, then `NEVER`.
    """

    inner: saga.SAGAState
    outer: saga.SAGAState
    per_sample: PyTree
    cursor: jax.Array
    next_refresh: jax.Array


def _inner_part(oracles: Oracles) -> Oracles:
    return oracles._replace(outer_grad_inner=None, outer_grad_outer=None)


def _outer_part(oracles: Oracles) -> Oracles:
    return oracles._replace(inner_grad=None, hvp=None, cross_jvp=None)


def estimator(
    problem: Problem,
    num_inner_batches: int,
    num_outer_batches: int,
    *,
    lazy: bool = False,
    init_tables: str = "zero",
    table_dtype: Any = None,
    table_placement: str = tables.DEVICE,
    max_table_bytes: int | None = None,
    coded_like: Batch | None = None,
) -> Estimator:
    """SAGA's estimate of each quantity; the arguments are `saba`'s, and two more.

    `lazy`: the outer optimiser takes `Rows` as they are. `coded_like`: a pair of minibatches, where
    codes are memorised.
    """
    total = num_inner_batches + num_outer_batches
    evaluate = evaluate_all if coded_like is None else evaluate_linear

    def memories(stored, decoded, **place):
        place |= {"dtype": table_dtype}
        return {
            "inner": saga.empty(
                _inner_part(stored), _inner_part(decoded), num_inner_batches, **place
            ),
            "outer": saga.empty(
                _outer_part(stored), _outer_part(decoded), num_outer_batches, **place
            ),
        }

    def init(variables):
        z, _, x = variables
        shapes = residual_codes.shapes(problem, variables, coded_like)
        tables.check_memory(table_placement)
        sizes = jax.eval_shape(lambda: memories(*shapes, traced=True))
        sizes = {side: memory.table for side, memory in sizes.items()}
        traced = tables.is_traced(z)
        tables.check_size(sizes, max_table_bytes, table_placement, traced)

        def vector(leaf):
            return None if lazy else jnp.zeros(leaf.shape, averages.wide(leaf))

        return SABAState(
            **memories(*shapes, memory=table_placement, traced=traced),
            per_sample=rows.map_prefix(problem.per_sample, vector, lambda _: None, x),
            cursor=jnp.int32(0),
            next_refresh=jnp.int32(0 if init_tables == "refresh" else NEVER),
        )

    def visit_inner(codes, position, state):
        new = saga.storable(_inner_part(codes.residuals))
        decode = residual_codes.storable(codes.decode)
        estimate, inner = saga.visit(state.inner, position, new, decode)
        dense, per_sample = saga.visit_rows(
            state.per_sample, codes.residuals.cross_jvp, num_inner_batches
        )
        cross = averages.cast_like(dense, codes.residuals.cross_jvp)
        cross = averages.cast_like(estimate.cross_jvp, cross)
        state = state.replace(inner=inner, per_sample=per_sample)
        return estimate._replace(cross_jvp=cross), state

    def visit_outer(codes, position, state):
        new = saga.storable(_outer_part(codes.residuals))
        decode = residual_codes.storable(codes.decode)
        estimate, outer = saga.visit(state.outer, position, new, decode)
        return estimate, state.replace(outer=outer)

    def update(oracle, variables, batch, state):
        evaluation = oracle.at(variables, evaluate)
        codes = residual_codes.codes_of(evaluation)
        of_inner, state = visit_inner(codes, batch.inner_id, state)
        of_outer, state = visit_outer(codes, batch.outer_id, state)
        estimates = of_inner._replace(
            outer_grad_inner=of_outer.outer_grad_inner, outer_grad_outer=of_outer.outer_grad_outer
        )
        estimates = plus(estimates, codes.exact)
        like = evaluation.oracles._replace(cross_jvp=estimates.cross_jvp)
        return Estimate(directions(averages.cast_like(estimates, like)), state, evaluation)

    def refresh(oracle, variables, batch, state):
        codes = residual_codes.codes_of(oracle.at(variables, evaluate))
        if batch.inner is not None:
            _, state = visit_inner(codes, batch.inner_id, state)
        else:
            _, state = visit_outer(codes, batch.outer_id, state)
        done = state.cursor + 1 == total
        return state.replace(
            cursor=jnp.where(done, 0, state.cursor + 1),
            next_refresh=jnp.where(done, NEVER, state.next_refresh),
        )

    full_pass = FullPass(refresh, lambda state: state.next_refresh, lambda state: state.cursor)
    return Estimator(init, update, full_pass, needs_ids=True)


@takes(CommonWithAdjoint)
def saba(
    problem: Problem,
    *,
    num_inner_batches: int,
    num_outer_batches: int,
    init_tables: str = "zero",
    table_dtype: Any = None,
    table_placement: str = tables.DEVICE,
    max_table_bytes: int | None = None,
    memory: str = "full",
    example_batch: Batch | None = None,
    **common: Unpack[CommonWithAdjoint],
) -> BilevelSolver:
    """SABA with an Optax optimiser for each variable (4 gradient units a step).

    Args:
        problem: a finite sum: what the losses give on a minibatch depends on (z, x) and its id
            only (BatchNorm, dropout and random augmentation break this; a warning says so).
        num_inner_batches: N, minibatches of the inner data; `batch.inner_id` lies in [0, N).
        num_outer_batches: M, the same for the outer data.
        init_tables: "zero", or "refresh": filled by one full pass before the first step.
        table_dtype: jnp.bfloat16 halves the tables (rows are rounded, the means follow the
            rounded rows, so the estimate stays unbiased, but its variance no longer vanishes);
            None: the parameters' own.
        table_placement: "device", or "pinned_host": the tables lie in the host's memory, and a step
            moves one row of each there and back.
        max_table_bytes: refuse larger tables; None: the memory of JAX's local devices, or the
            host's.
        memory: "full", or "compact" for a `linear_problem`: one residual for each example and
            class instead of one number for each parameter. Exact.
        example_batch: a minibatch of each side, for "compact"; its shapes suffice.
        **common: optimisers and weights, see `solvers.keywords`.

    Raises:
        ValueError: no positive number of minibatches, weights of another length, an unknown
            `init_tables`, `table_dtype`, `table_placement` or `memory`, a compact memory without a
            `linear_problem` or an `example_batch`; from `init`, tables that do not fit, or
            a memory that the device does not have; from `update`, ids missing from the batch.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x - batch) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> data = jnp.array([[-1.0], [1.0]])
        >>> solver = bf.saba(
        ...     problem, inner=optax.sgd(0.3), outer=optax.sgd(0.1),
        ...     num_inner_batches=2, num_outer_batches=2,
        ... )
        >>> state = solver.init(jnp.zeros(1), jnp.ones(1))
        >>> update = jax.jit(solver.update)
        >>> for step in range(400):
        ...     i, j = step % 2, step // 2 % 2
        ...     state, info = update(state, bf.Batch(data[i], 5 + data[j], i, j))
        >>> round(float(state.outer_params[0]), 4)
        5.0
    """
    check_sum(problem, "saba", num_inner_batches, num_outer_batches, common)
    if init_tables not in ("zero", "refresh"):
        raise ValueError(f'init_tables={init_tables!r} is unknown: choose "zero" or "refresh"')
    if table_dtype is not None and jnp.dtype(table_dtype) not in _TABLE_DTYPES:
        raise ValueError(
            f"table_dtype={table_dtype!r} is not among {[d.name for d in _TABLE_DTYPES]} "
            "(float16 overflows); None keeps the parameters' own"
        )
    if table_placement not in tables.MEMORIES:
        raise ValueError(
            f"table_placement={table_placement!r} is unknown: choose one of {tables.MEMORIES}"
        )
    residual_codes.check_memory(memory, problem, example_batch)
    saga_estimator = estimator(
        problem,
        num_inner_batches,
        num_outer_batches,
        lazy=takes_rows(common),
        init_tables=init_tables,
        table_dtype=table_dtype,
        table_placement=table_placement,
        max_table_bytes=max_table_bytes,
        coded_like=example_batch if memory == "compact" else None,
    )
    return single_loop(problem, saga_estimator, name="saba", **common)
