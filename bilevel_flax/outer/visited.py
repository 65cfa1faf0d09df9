"""Statistics of a direction of x over the entries that the minibatch visited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows


def mean(node: Any, leaf: jax.Array, size: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The mean of `size(values)` over a dense leaf, or over the visited rows of a per-sample one.

    Args:
        node: a direction's leaf, dense or `Rows`.
        leaf: x's leaf; a row's index of its length stands for "no row".
        size: of an array of float32, entry by entry.

    Returns:
        A float32 scalar; 0 where no row was visited.
    """
    if not rows.is_rows(node):
        return jnp.mean(size(node.astype(jnp.float32)))
    real = node.index < leaf.shape[0]
    by_row = size(node.values.astype(jnp.float32)).reshape(len(node.index), -1).mean(1)
    return jnp.sum(jnp.where(real, by_row, 0.0)) / jnp.maximum(jnp.sum(real), 1)
