"""The two poolings of DARTS's cells: 3x3, k // 2 pixels around the image left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def max_pool(images: jax.Array, stride: int = 1) -> jax.Array:
    """The largest of the 3x3 pixels around each.

    Args:
        images: [..., height, width, channels].
        stride: between outputs.

    Returns:
        [..., ceil(height / stride), ceil(width / stride), channels].
    """
    lead = (1,) * (images.ndim - 3)
    around = ((0, 0),) * len(lead) + ((1, 1), (1, 1), (0, 0))
    window, strides = (*lead, 3, 3, 1), (*lead, stride, stride, 1)
    return lax.reduce_window(images, -jnp.inf, lax.max, window, strides, around)


def average_pool(images: jax.Array, stride: int = 1) -> jax.Array:
    """The mean of the 3x3 pixels around each, those outside of the image left out.

    As two small matrices, which is cheap to differentiate twice on every backend.

    Args:
        images: [..., height, width, channels].
        stride: between outputs.

    Returns:
        [..., ceil(height / stride), ceil(width / stride), channels].
    """
    rows, columns = (_means(size, stride).astype(images.dtype) for size in images.shape[-3:-1])
    return jnp.einsum("ph,qw,...hwc->...pqc", rows, columns, images)


def _means(length: int, stride: int) -> np.ndarray:
    near = np.abs(np.arange(0, length, stride)[:, None] - np.arange(length)) <= 1
    return (near / near.sum(1, keepdims=True)).astype(np.float32)
