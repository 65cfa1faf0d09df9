"""Pieces for writing losses on padded minibatches."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over the real examples of a minibatch.

    Args:
        values: [batch], one value for each example (already weighted, where there are weights).
        mask: [batch], 1 for real examples and 0 for padding (`batch.get("mask")`); None: all real.

    Returns:
        Scalar; a padded example contributes nothing, even when its value is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    if mask is None:
        return jnp.mean(values)
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {mask.shape}, values {values.shape}: give one value an example"
        )
    total = jnp.sum(jnp.where(mask > 0, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)
