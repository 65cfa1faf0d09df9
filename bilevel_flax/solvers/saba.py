"""SABA: SAGA on each of the five quantities of a bilevel problem. Constant steps suffice.

Each of ∇₁G, ∇²₁₁G v and ∇²₂₁G v over the N inner minibatches, and of ∇₁F and ∇₂F over the M outer
ones, goes through a SAGA memory of its own (`saga_memory`). With S[new_i] = new_i - mem[i] + mean
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

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import NEVER, Batch, BilevelSolver, Estimator, Oracles, Problem, PyTree
from bilevel_flax.checks import check_partition, warn_unless_finite_sum
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers.memory import averages as running
from bilevel_flax.solvers.memory import residual_codes as components
from bilevel_flax.solvers.memory import saga as saga_memory
from bilevel_flax.solvers.memory import tables
from bilevel_flax.solvers.single_loop import single_loop
from bilevel_flax.solvers.soba import directions

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

    inner: saga_memory.Memory
    outer: saga_memory.Memory
    per_sample: PyTree
    cursor: jax.Array
    next_refresh: jax.Array


def _inner_part(found: Oracles) -> Oracles:
    return found._replace(outer_grad_inner=None, outer_grad_outer=None)


def _outer_part(found: Oracles) -> Oracles:
    return found._replace(inner_grad=None, hvp=None, cross_jvp=None)


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
    evaluate = oracles.evaluate_all if coded_like is None else oracles.evaluate_linear

    def memories(stored, decoded, **place):
        place |= {"dtype": table_dtype}
        return {
            "inner": saga_memory.empty(
                _inner_part(stored), _inner_part(decoded), num_inner_batches, **place
            ),
            "outer": saga_memory.empty(
                _outer_part(stored), _outer_part(decoded), num_outer_batches, **place
            ),
        }

    def init(variables):
        z, _, x = variables
        shapes = components.shapes(problem, variables, coded_like)
        tables.check_memory(table_placement)
        sizes = jax.eval_shape(lambda: memories(*shapes, traced=True))
        sizes = {side: memory.table for side, memory in sizes.items()}
        traced = tables.is_traced(z)
        tables.check_size(sizes, max_table_bytes, table_placement, traced)

        def vector(leaf):
            return None if lazy else jnp.zeros(leaf.shape, running.wide(leaf))

        return SABAState(
            **memories(*shapes, memory=table_placement, traced=traced),
            per_sample=rows.map_prefix(problem.per_sample, vector, lambda _: None, x),
            cursor=jnp.int32(0),
            next_refresh=jnp.int32(0 if init_tables == "refresh" else NEVER),
        )

    def visit_inner(parts, position, state):
        new = saga_memory.storable(_inner_part(parts.codes))
        estimate, inner = saga_memory.visit(
            state.inner, position, new, components.storable(parts.decode)
        )
        dense, per_sample = saga_memory.visit_rows(
            state.per_sample, parts.codes.cross_jvp, num_inner_batches
        )
        cross = running.handed_on(dense, parts.codes.cross_jvp)
        cross = running.handed_on(estimate.cross_jvp, cross)
        state = state.replace(inner=inner, per_sample=per_sample)
        return estimate._replace(cross_jvp=cross), state

    def visit_outer(parts, position, state):
        new = saga_memory.storable(_outer_part(parts.codes))
        estimate, outer = saga_memory.visit(
            state.outer, position, new, components.storable(parts.decode)
        )
        return estimate, state.replace(outer=outer)

    def update(oracle, variables, batch, state):
        found = oracle(variables, evaluate)
        parts = components.of(found)
        inner, state = visit_inner(parts, batch.inner_id, state)
        outer, state = visit_outer(parts, batch.outer_id, state)
        estimates = oracles.plus(Oracles(*inner[:3], *outer[3:]), parts.exact)
        own = found.oracles._replace(cross_jvp=estimates.cross_jvp)
        return directions(running.handed_on(estimates, own)), state, found

    def refresh(oracle, variables, batch, state):
        parts = components.of(oracle(variables, evaluate))
        if batch.inner is not None:
            _, state = visit_inner(parts, batch.inner_id, state)
        else:
            _, state = visit_outer(parts, batch.outer_id, state)
        done = state.cursor + 1 == total
        return state.replace(
            cursor=jnp.where(done, 0, state.cursor + 1),
            next_refresh=jnp.where(done, NEVER, state.next_refresh),
        )

    return Estimator(
        init=init,
        update=update,
        refresh=refresh,
        next_refresh=lambda state: state.next_refresh,
        refresh_cursor=lambda state: state.cursor,
        refresh_units=(3.0, 1.0),
        fixed_keys=True,
        needs_ids=True,
    )


def saba(
    problem: Problem,
    *,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    adjoint: optax.GradientTransformation | None = None,
    num_inner_batches: int,
    num_outer_batches: int,
    inner_weights: Any = None,
    outer_weights: Any = None,
    init_tables: str = "zero",
    table_dtype: Any = None,
    table_placement: str = tables.DEVICE,
    max_table_bytes: int | None = None,
    memory: str = "full",
    example_batch: Batch | None = None,
) -> BilevelSolver:
    """SABA with an Optax optimiser for each variable (4 gradient units a step).

    Args:
        problem: a finite sum: what the losses give on a minibatch depends on (z, x) and its id
            only (BatchNorm, dropout and random augmentation break this; a warning says so).
        inner: as in `single_loop`, and so are `outer`, `adjoint`, `inner_weights` and
            `outer_weights`.
        outer: optimiser of x.
        adjoint: optimiser of v; None: as `inner`.
        num_inner_batches: N, minibatches of the inner data; `batch.inner_id` lies in [0, N).
        num_outer_batches: M, the same for the outer data.
        inner_weights: float [N], shares of the samples; None: equal.
        outer_weights: float [M].
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
    check_partition("num_inner_batches", num_inner_batches, "inner_weights", inner_weights)
    check_partition("num_outer_batches", num_outer_batches, "outer_weights", outer_weights)
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
    components.check_memory(memory, problem, example_batch)
    warn_unless_finite_sum(problem, "saba")
    return single_loop(
        problem,
        estimator(
            problem,
            num_inner_batches,
            num_outer_batches,
            lazy=isinstance(outer, RowTransformation),
            init_tables=init_tables,
            table_dtype=table_dtype,
            table_placement=table_placement,
            max_table_bytes=max_table_bytes,
            coded_like=example_batch if memory == "compact" else None,
        ),
        inner=inner,
        outer=outer,
        adjoint=adjoint,
        inner_weights=inner_weights,
        outer_weights=outer_weights,
        name="saba",
    )
