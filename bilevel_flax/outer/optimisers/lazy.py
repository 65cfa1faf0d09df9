"""Row-sparse optimisers: a row moves, and its moments age, only when its example is visited.

Per-sample leaves [n, ...] of x reach these as `Rows(index, values)`. A step costs O(batch)
instead of O(n), and Adam's moments are those of the row's own gradients: under dense Adam a row
that is visited once an epoch keeps moving on the decaying moments of its last visit, with a
second moment that is mostly made of zeros. A row that was visited k times is exactly where k
steps of Adam on its own would have put it:

    t_r += 1    m_r = β₁ m_r + (1 - β₁) g_r    s_r = β₂ s_r + (1 - β₂) g_r²
    x_r -= γ (m_r / (1 - β₁^t_r)) / (√(s_r / (1 - β₂^t_r)) + ε)

Leaves that are not per-sample get the ordinary dense update. Learning-rate schedules are
functions of the number of steps, not of visits. An example that occurs twice in a minibatch is
visited once, with the sum of its gradients.

References:
    D. P. Kingma, J. Ba. Adam: a method for stochastic optimization. ICLR 2015.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks, tree
from bilevel_flax.base import PyTree, Rows, Table
from bilevel_flax.per_sample import RowTransformation, is_rows


class RowMoments(NamedTuple):
    """Adam's memory of a leaf [n, ...], by row; float32 at least."""

    count: jax.Array  # int32 [n], visits
    mean: jax.Array  # [n, ...]
    square: jax.Array  # [n, ...]


class LazySGDState(NamedTuple):
    """State of `lazy_sgd`."""

    count: jax.Array  # int32, steps taken


class LazyAdamState(NamedTuple):
    """State of `lazy_adam`."""

    dense: Any  # optax.ScaleByAdamState of the leaves that are not per-sample; counts the steps
    by_row: PyTree  # Table(RowMoments) at per-sample leaves, else None


def _is_table(node: Any) -> bool:
    return isinstance(node, Table)


def _rate(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _descent(directions: PyTree, rate: Any) -> PyTree:
    def step(node):
        if is_rows(node):
            return Rows(node.index, step(node.values))
        return -jnp.asarray(rate, node.dtype) * node

    return jax.tree.map(step, directions, is_leaf=is_rows)


def lazy_sgd(learning_rate: optax.ScalarOrSchedule) -> RowTransformation:
    """SGD that touches the visited rows only: x_r -= γ g_r.

    The same iterates as `optax.sgd`, in O(batch) a step.

    Args:
        learning_rate: γ, or a schedule of the step count.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> optimiser = lazy_sgd(0.5)
        >>> x = jnp.zeros(1000)
        >>> direction = bf.Rows(jnp.array([3, 7]), jnp.array([2.0, 4.0]))
        >>> update, _ = optimiser.update(direction, optimiser.init(bf.Table(x)), x)
        >>> update.index.tolist(), update.values.tolist()
        ([3, 7], [-1.0, -2.0])
    """
    checks.learning_rate("learning_rate", learning_rate)

    def init(params):
        del params
        return LazySGDState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        steps = _descent(updates, _rate(learning_rate, state.count))
        return steps, LazySGDState(jnp.asarray(optax.safe_increment(state.count)))

    return RowTransformation(init, update)


def _merged(node: Rows, num_rows: int) -> Rows:
    """The same direction with every row occurring once; the freed places point at no row."""
    order = jnp.argsort(node.index)
    index, values = node.index[order], node.values[order]
    first = jnp.concatenate([jnp.ones(1, bool), index[1:] != index[:-1]])
    slot = jnp.cumsum(first) - 1
    values = jnp.zeros_like(values).at[slot].add(values)
    return Rows(jnp.full_like(index, num_rows).at[slot].set(index), values)


def lazy_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> RowTransformation:
    """Adam whose moments and bias correction belong to each row, and age with its visits only.

    Args:
        learning_rate: γ, or a schedule of the step count.
        b1: β₁, decay of the mean, per visit.
        b2: β₂, decay of the mean square, per visit.
        eps: ε, in units of the direction.

    Raises:
        ValueError: `b1` or `b2` is outside [0, 1).
        TypeError: from `update`, `Rows` for a leaf that was not declared per-sample at `init`.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> optimiser = lazy_adam(0.1)
        >>> x = jnp.zeros(1000)
        >>> direction = bf.Rows(jnp.array([3, 7]), jnp.array([2.0, -4.0]))
        >>> update, state = optimiser.update(direction, optimiser.init(bf.Table(x)), x)
        >>> [round(float(value), 4) for value in update.values]
        [-0.1, 0.1]
        >>> int(state.by_row.rows.count.sum())
        2
    """
    checks.learning_rate("learning_rate", learning_rate)
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must lie in [0, 1)")
    dense = optax.scale_by_adam(b1, b2, eps)

    def init(params):
        def moments(node):
            if not _is_table(node):
                return None
            leaf = node.rows
            wide = tree.wide(leaf.dtype)
            count = jnp.zeros(leaf.shape[:1], jnp.int32)
            return Table(RowMoments(count, *(jnp.zeros(leaf.shape, wide) for _ in range(2))))

        shared = jax.tree.map(lambda n: None if _is_table(n) else n, params, is_leaf=_is_table)
        return LazyAdamState(dense.init(shared), jax.tree.map(moments, params, is_leaf=_is_table))

    def visit(node: Rows, table: Table) -> tuple[Rows, Table]:
        memory = table.rows
        node = _merged(node, len(memory.count))
        # What is written depends on all that is read, so XLA updates the table in place.
        read = jax.tree.map(lambda rows: rows.at[node.index].get(mode="fill", fill_value=0), memory)
        grad = node.values.astype(memory.mean.dtype)
        new = RowMoments(
            jnp.asarray(optax.safe_increment(read.count)),
            (1 - b1) * grad + b1 * read.mean,
            (1 - b2) * grad**2 + b2 * read.square,
        )
        count = new.count.reshape(-1, *(1,) * (grad.ndim - 1)).astype(grad.dtype)
        mean = new.mean / (1 - b1**count)
        square = new.square / (1 - b2**count)
        values = mean / (jnp.sqrt(square) + eps)
        written = jax.tree.map(
            lambda rows, row: rows.at[node.index].set(row, mode="drop"), memory, new
        )
        return Rows(node.index, values), Table(written)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        nodes, treedef = jax.tree.flatten(updates, is_leaf=lambda n: n is None or is_rows(n))
        tables = treedef.flatten_up_to(state.by_row)
        if any(is_rows(n) and t is None for n, t in zip(nodes, tables, strict=True)):
            raise TypeError(
                "lazy_adam got Rows for a leaf that it has no row moments of: wrap the per-sample "
                "leaves at init, init(bf.Table(leaf)), as the solvers do for those in "
                "Problem(per_sample=...)"
            )
        rate = _rate(learning_rate, state.dense.count)
        shared = treedef.unflatten([None if is_rows(node) else node for node in nodes])
        moves, dense_state = dense.update(shared, state.dense)

        steps = treedef.flatten_up_to(moves)
        for i, (node, table) in enumerate(zip(nodes, tables, strict=True)):
            if is_rows(node):
                steps[i], tables[i] = visit(node, table)
        moved = _descent(treedef.unflatten(steps), rate)
        return moved, LazyAdamState(dense_state, treedef.unflatten(tables))

    return RowTransformation(init, update)
