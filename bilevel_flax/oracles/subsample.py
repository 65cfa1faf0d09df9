"""∇₁G on the whole minibatch, and the other quantities on one block of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Variables
from bilevel_flax.oracles.derivatives import (
    inner_products,
)
from bilevel_flax.oracles.evaluate import Evaluation, merge_aux
from bilevel_flax.oracles.gradients import (
    inner_value_and_grad,
    outer_value_and_grads,
)
from bilevel_flax.oracles.weighted_sums import amount
from bilevel_flax.tree import is_inexact


def evaluate_subsample(
    problem: Problem,
    variables: Variables,
    batch: Batch,
    model_state=None,
    rngs=(None, None),
    *,
    block: jax.Array,
    parts: int,
) -> Evaluation:
    """`evaluate_all` with ∇₁G on the whole minibatch and the rest on one of its `parts` blocks.

    Averaged over the blocks it is `evaluate_all` (for losses without BatchNorm), at 1 + 3/parts
    gradient units. The model state and the inner loss are those of the whole minibatch.

    Args:
        problem: the problem.
        variables: the point (z, v, x).
        batch: both sides; leaves [batch, ...] with `parts` dividing batch.
        model_state: mutable state of a stateful problem.
        rngs: the keys of (G, F).
        block: int32 scalar in [0, parts).
        parts: number of blocks.

    Raises:
        ValueError: `parts` does not divide a leading length, or a loss is no mean over examples.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     lambda z, x, b: 0.5 * jnp.mean(b * (z - x) ** 2), lambda z, x, b: jnp.mean(z * b)
        ... )
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> batch = bf.Batch(jnp.arange(4.0), jnp.arange(4.0))
        >>> found = bf.oracles.evaluate_subsample(
        ...     problem, point, batch, block=jnp.array(1), parts=2
        ... ).oracles
        >>> float(found.inner_grad), float(found.hvp)  # of all four, of the last two
        (-4.5, 2.5)
    """
    z, _, x = variables
    (inner_loss, inner_aux), grad = inner_value_and_grad(
        problem, z, x, batch.inner, model_state, rngs[0]
    )

    def block_of(side, minibatch, rng):
        count = lambda part: amount(
            problem, side, (z, x), part, (model_state, rng), f"a subsample of 1/{parts}"
        )
        return _block(minibatch, block, parts, count)

    inner_part, inner_share = block_of("inner_loss", batch.inner, rngs[0])
    outer_part, outer_share = block_of("outer_loss", batch.outer, rngs[1])
    _, _, product, cross = inner_products(problem, variables, inner_part, model_state, rngs[0])
    state = inner_aux.model_state if problem.outer_updates_state else model_state
    (outer_loss, outer_aux), outer_inner, outer_outer = outer_value_and_grads(
        problem, z, x, outer_part, state, rngs[1]
    )
    product, cross = _weigh((product, cross), inner_share)
    outer_inner, outer_outer = _weigh((outer_inner, outer_outer), outer_share)
    oracles = Oracles(grad, product, cross, outer_inner, outer_outer)
    return Evaluation(oracles, inner_loss, outer_loss, *merge_aux(problem, inner_aux, outer_aux))


def _block(batch: PyTree, block: jax.Array, parts: int, count: Callable) -> tuple[PyTree, Any]:
    """Block number `block` of `parts` equal ones, and what makes its weighted mean unbiased."""

    def cut(leaf):
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"a leaf of the minibatch has shape {leaf.shape}: subsample=1/{parts} needs a "
                f"leading length that {parts} divides"
            )
        size = leaf.shape[0] // parts
        return jax.lax.dynamic_slice_in_dim(leaf, block * size, size)

    chosen, total = jax.tree.map(cut, batch), count(batch)
    if total is None:
        return chosen, None
    return chosen, count(chosen) * parts / jnp.where(total > 0, total, 1)


def _weigh(tree: PyTree, share: Any) -> PyTree:
    """The float leaves times a block's share; a block of padding alone may well give NaN."""
    if share is None:
        return tree
    return jax.tree.map(
        lambda leaf: (
            jnp.where(share > 0, leaf * share.astype(leaf.dtype), 0) if is_inexact(leaf) else leaf
        ),
        tree,
    )
