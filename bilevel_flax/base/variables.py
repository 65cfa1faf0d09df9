"""A point (z, v, x), its minibatches and the quantities that are computed there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import struct

PyTree = Any
Metrics = Mapping[str, jax.Array]


class Variables(NamedTuple):
    """A point (z, v, x); directions and updates are the same type, as in Optax.

    Attributes:
        inner: z, the network's parameters, any pytree.
        adjoint: v, with the tree, shapes and dtypes of `inner`.
        outer: x, the hyperparameters, any pytree.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> point = bf.Variables({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, jnp.ones(()))
        >>> z, v, x = point
        >>> z["w"].shape == v["w"].shape
        True
    """

    inner: PyTree
    adjoint: PyTree
    outer: PyTree


class Batch(NamedTuple):
    """One minibatch of the inner and one of the outer data.

    Attributes:
        inner: the minibatch given to the inner loss, any pytree; None in an outer refresh.
        outer: the minibatch given to the outer loss, any pytree; None in an inner refresh.
        inner_id: int32 scalar, the minibatch's position in the partition of the inner data, or
            None where a solver needs none. With `BilevelSolver.batches = (K, L)` other than
            (1, 1), the leaves and ids carry a leading [K] and [L]; a side of one minibatch may
            come without its axis if its id does too.
        outer_id: the same for the outer data.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> batch = bf.Batch(inner={"x": np.ones(8)}, outer={"x": np.zeros(4)})
        >>> batch.inner_id is None  # SABA and its like need ids, SOBA none
        True
    """

    inner: PyTree = None
    outer: PyTree = None
    inner_id: jax.Array | None = None
    outer_id: jax.Array | None = None


class Oracles(NamedTuple):
    """The five quantities that every method is made of (and that SABA memorises).

    Attributes:
        inner_grad: ∇₁G(z, x), tree of z.
        hvp: ∇²₁₁G(z, x) v, tree of z.
        cross_jvp: ∇²₂₁G(z, x) v, tree of x; per-sample leaves are `Rows`.
        outer_grad_inner: ∇₁F(z, x), tree of z.
        outer_grad_outer: ∇₂F(z, x), tree of x; per-sample leaves are None (F never sees them).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> oracles = bf.oracles.evaluate(problem, point, bf.Batch(1.0, 1.0))
        >>> float(oracles.inner_grad), float(oracles.hvp), float(oracles.cross_jvp)
        (-3.0, 1.0, -1.0)
        >>> float(oracles.outer_grad_inner), float(oracles.outer_grad_outer)
        (1.0, 0.0)
    """

    inner_grad: PyTree
    hvp: PyTree
    cross_jvp: PyTree
    outer_grad_inner: PyTree
    outer_grad_outer: PyTree


class Rows(NamedTuple):
    """The rows of a per-sample leaf that one minibatch touches; all others are zero.

    Attributes:
        index: int32 [batch], the rows. An index of n (one past the end) stands for "no row".
        values: `[batch, *leaf.shape[1:]]`, one value for each of them.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> rows = bf.Rows(index=jnp.array([2, 0]), values=jnp.array([0.5, 1.5]))
        >>> jnp.zeros(3).at[rows.index].add(rows.values).tolist()
        [1.5, 0.0, 0.5]
    """

    index: jax.Array
    values: jax.Array


class Table(struct.PyTreeNode):
    """A large array that is updated by rows; never touched as a whole inside a step.

    Estimator memories and the moments of row-sparse optimisers are wrapped in it, so that
    whatever walks over the state (the freeze on NaN, sharding rules, size checks) can tell.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> table = bf.Table(jnp.zeros((1000, 3)))
        >>> [leaf.shape for leaf in jax.tree.leaves(table)]
        [(1000, 3)]
    """

    rows: PyTree  # leaves [num_rows, ...]
