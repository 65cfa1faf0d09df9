"""A minibatch in k equal parts, one after the other: less memory for activations, same numbers.

The losses are means over the minibatch's examples, so every quantity of the whole minibatch is the
mean of the parts' quantities, weighted by each part's share of the real examples:

    q(minibatch) = sum_i s_i q(part_i)        s_i = sum(mask_i) / sum(mask),  1/k without a mask

with the mask of `minibatches.example_mask`; parts of a (sum, weight) loss count by their weight.

A scan adds them up; activations, and the tangents beside them, live for one part at a time. Part i
holds the examples i, i + k, i + 2k ...: where the minibatch is sharded over devices by its leading
axis, so is each part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Metrics, Problem, PyTree, Rows
from bilevel_flax.base.wrapped_loss import WrappedLoss
from bilevel_flax.oracles.weighted_sums import amount
from bilevel_flax.per_sample import is_rows
from bilevel_flax.tree import is_inexact


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatched(WrappedLoss):
    """A mean over examples whose derivatives are to be summed over parts of the minibatch.

    Attributes:
        parts: k > 1.
    """

    parts: int


def in_parts(loss: Any) -> bool:
    """Whether a loss asks for its derivatives in parts."""
    return isinstance(loss, Microbatched)


def whole(
    quantity: Callable[..., tuple],
    problem: Problem,
    side: str,
    point: tuple[PyTree, PyTree],
    batch: PyTree,
    model_state: PyTree,
    rng: Any,
) -> tuple:
    """A quantity of the whole minibatch, put together from those of its parts if so asked for.

    Args:
        quantity: `quantity(problem, batch, model_state, rng) -> ((loss, aux), *trees)`, all of them
            means over the examples; `Rows` in the trees belong to one example each.
        problem: its loss may be `Microbatched`; `quantity` is handed it without.
        side: "inner_loss" or "outer_loss", the loss in question.
        point: (z, x), of which a loss's weight may know the shapes.
        batch: the minibatch; leaves [batch, ...], which the number of parts divides. Scalars go to
            every part.
        model_state: mutable state. G's parts, and F's where it updates the state, are each handed
            the one after the part before; otherwise every part is handed this one.
        rng: a key, from which each part gets its own, or None.

    Returns:
        The same as `quantity`: sums in the dtypes of the parts' quantities (added up in float32 at
        least), the last part's model state, the mean metrics, and one entry of `Rows` for each
        example, in the minibatch's order.

    Raises:
        ValueError: the number of parts does not divide a leading length.
    """
    loss = getattr(problem, side)
    if not in_parts(loss):
        return quantity(problem, batch, model_state, rng)
    count = loss.parts
    problem = dataclasses.replace(problem, **{side: loss.loss})
    if not any(jnp.ndim(leaf) for leaf in jax.tree.leaves(batch)):
        return quantity(problem, batch, model_state, rng)
    threaded = side == "inner_loss" or problem.outer_updates_state
    batch = jax.tree_util.tree_map_with_path(lambda path, leaf: _in_parts(path, leaf, count), batch)

    def part_of(number):
        chosen = jax.tree.map(
            lambda leaf: (
                jax.lax.dynamic_index_in_dim(leaf, number, 1, keepdims=False) if leaf.ndim else leaf
            ),
            batch,
        )
        return chosen, None if rng is None else jax.random.fold_in(rng, number)

    def amount_of(number):
        chosen, key = part_of(number)
        splits = f"microbatches={count}"
        return amount(problem, side, point, chosen, (model_state, key), splits)

    shares = _shares(amount_of, count)

    def part(number, state):
        chosen, key = part_of(number)
        (loss, aux), *trees = quantity(problem, chosen, state, key)
        check_scalars(aux.metrics, f"microbatches={count}")
        metrics = {k: jnp.asarray(v, _wide(v * 1.0)) for k, v in aux.metrics.items()}
        return (loss, aux._replace(model_state=None, metrics=metrics), trees), (
            aux.model_state if threaded else state
        )

    shapes, _ = jax.eval_shape(part, jnp.int32(0), model_state)

    def add(carry, number):
        totals, state = carry
        quantities, state = part(number, state)
        terms = jax.tree.map(lambda node: _times(node, shares[number]), quantities, is_leaf=is_rows)
        totals = jax.tree.map(
            lambda total, term: None if total is None else total + term,
            totals,
            terms,
            is_leaf=lambda node: node is None,
        )
        by_example = jax.tree.map(
            lambda term: term if is_rows(term) else None, terms, is_leaf=is_rows
        )
        return (totals, state), by_example

    start = jax.tree.map(
        lambda node: None if is_rows(node) else jnp.zeros(node.shape, _wide(node)),
        shapes,
        is_leaf=is_rows,
    )
    (totals, state), by_example = jax.lax.scan(add, (start, model_state), jnp.arange(count))

    def joined(node, total, shape):
        if node is None:
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, shape)
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), node)

    loss, aux, trees = jax.tree.map(
        joined, by_example, totals, shapes, is_leaf=lambda node: node is None or is_rows(node)
    )
    return (loss, aux._replace(model_state=state)), *trees


def check_scalars(metrics: Metrics, splits: str) -> None:
    """Raises unless all metrics are scalars, which can be averaged over the parts of a minibatch.

    Args:
        metrics: of a part.
        splits: what cuts the minibatch into parts, for the error.

    Raises:
        ValueError: names the first that is none.
    """
    for name, value in metrics.items():
        if jnp.shape(value):
            raise ValueError(
                f"the metric {name!r} has shape {jnp.shape(value)}, but {splits} averages metrics "
                "over the parts of a minibatch: return scalars, e.g. its mean"
            )


def _in_parts(path, leaf, count: int):
    """[batch, ...] -> [batch / count, count, ...]; axis 1 is the part's number."""
    leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    if not leaf.ndim:
        return leaf
    if leaf.shape[0] % count:
        raise ValueError(
            f"microbatches={count} does not divide the minibatch: its leaf "
            f"{jax.tree_util.keystr(path) or 'array'} has shape {leaf.shape}; choose a divisor of "
            f"{leaf.shape[0]}, or another batch size"
        )
    return leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:])


def _shares(amount_of: Callable[[Any], Any], count: int) -> jax.Array:
    """Each part's share of what counts, [count]."""
    equal = jnp.full(count, 1 / count)
    if jax.eval_shape(amount_of, jnp.int32(0)) is None:
        return equal
    real = jax.lax.map(amount_of, jnp.arange(count)).astype(equal.dtype)
    total = real.sum()
    return jnp.where(total > 0, real / jnp.where(total > 0, total, 1), equal)


def _wide(leaf: Any):
    dtype = jnp.result_type(leaf)
    return jnp.promote_types(dtype, jnp.float32) if is_inexact(leaf) else dtype


def _times(node: Any, share: jax.Array):
    if is_rows(node):
        return Rows(node.index, _times(node.values, share).astype(node.values.dtype))
    if not is_inexact(node):
        return node  # a zero, opposite a leaf that is not differentiated
    wide = _wide(node)
    # A part of padding alone may well give NaN.
    return jnp.where(share > 0, node.astype(wide) * share.astype(wide), 0)
