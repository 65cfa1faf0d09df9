"""Less than all of it: ∇₁G on the whole minibatch, the rest on a block of it or not at all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Variables
from bilevel_flax.minibatches import example_mask
from bilevel_flax.oracles.derivatives import (
    inner_products,
    inner_value_and_grad,
    outer_value_and_grads,
)
from bilevel_flax.oracles.evaluate import Evaluation, merged
from bilevel_flax.tree import is_inexact


def _block(batch: PyTree, block: jax.Array, parts: int) -> tuple[PyTree, Any]:
    """Block number `block` of `parts` equal ones, and what makes its masked mean unbiased."""

    def cut(leaf):
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            raise ValueError(
                f"a leaf of the minibatch has shape {leaf.shape}: fraction=1/{parts} needs a "
                f"leading length that {parts} divides"
            )
        size = leaf.shape[0] // parts
        return jax.lax.dynamic_slice_in_dim(leaf, block * size, size)

    mask = example_mask(batch, f"a subsample of 1/{parts}")
    chosen = jax.tree.map(cut, batch)
    if mask is None:
        return chosen, None
    total = jnp.sum(mask)
    return chosen, jnp.sum(cut(mask)) * parts / jnp.where(total > 0, total, 1)


def _times(tree: PyTree, factor: Any) -> PyTree:
    if factor is None:
        return tree

    def leaf_times(leaf):
        if not is_inexact(leaf):
            return leaf
        # A block of padding alone may well give NaN.
        return jnp.where(factor > 0, leaf * factor.astype(leaf.dtype), 0)

    return jax.tree.map(leaf_times, tree)


def evaluate_block(
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
        ValueError: `parts` does not divide a leading length.
    """
    z, _, x = variables
    (inner_loss, inner_aux), grad = inner_value_and_grad(
        problem, z, x, batch.inner, model_state, rngs[0]
    )
    inner_part, inner_share = _block(batch.inner, block, parts)
    outer_part, outer_share = _block(batch.outer, block, parts)
    _, _, product, cross = inner_products(problem, variables, inner_part, model_state, rngs[0])
    seen = inner_aux.model_state if problem.outer_updates_state else model_state
    (outer_loss, outer_aux), outer_inner, outer_outer = outer_value_and_grads(
        problem, z, x, outer_part, seen, rngs[1]
    )
    product, cross = _times((product, cross), inner_share)
    outer_inner, outer_outer = _times((outer_inner, outer_outer), outer_share)
    found = Oracles(grad, product, cross, outer_inner, outer_outer)
    return Evaluation(found, inner_loss, outer_loss, *merged(problem, inner_aux, outer_aux))


def evaluate_inner(
    problem: Problem, variables: Variables, batch: Batch, model_state=None, rngs=(None, None)
) -> Evaluation:
    """∇₁G alone (1 unit); F is not evaluated, an `outer_updates_state` skipped."""
    (loss, aux), grad = inner_value_and_grad(
        problem, variables.inner, variables.outer, batch.inner, model_state, rngs[0]
    )
    metrics = {f"inner_{k}": v for k, v in aux.metrics.items()}
    found = Oracles(grad, None, None, None, None)
    return Evaluation(found, loss, None, aux.model_state, metrics)
