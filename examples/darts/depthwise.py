"""Depthwise convolutions, several kernels at a time, for each backend what is fast there.

XLA's CPU backend has no good depthwise convolution: in a search step (64 images of 14x14, 8
channels, four 5x5 kernels) `lax.conv` takes 266 ms and the sum of 25 shifted images, which is the
best way to the gradient alone, 330 ms, for forward mode over that sum computes shifts over and
over. As a matrix from all pixels to all pixels for each channel it takes 102 ms, of 7x7 images
9 ms (91, 86), whatever the kernels' sizes, and all kernels on one image are one product.
Elsewhere, and for large images, it is `lax.conv`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MOST_PIXELS = 256  # matrices grow with the square of the pixels


def depthwise(
    images: jax.Array,
    kernels: Sequence[jax.Array],
    dilations: Sequence[int],
    stride: int = 1,
    as_matrix: bool | None = None,
) -> jax.Array:
    """Each channel with its own kernel, "SAME" zeros around the image; K kernels on each state.

    Args:
        images: [states, batch, height, width, channels].
        kernels: for each dilation, [states, some of K, size, size, channels], sizes odd.
        dilations: pixels between the taps.
        stride: between outputs.
        as_matrix: as a product with a matrix of pixels by pixels; None: on a CPU, if it is small.

    Returns:
        [states, K, batch, ceil(height / stride), ceil(width / stride), channels].
    """
    height, width = images.shape[-3:-1]
    if as_matrix is None:
        as_matrix = jax.default_backend() == "cpu" and height * width <= _MOST_PIXELS
    if as_matrix:
        return _by_matrix(images, _embedded(kernels, dilations), stride)
    outputs = [
        _by_convolution(images, kernel, stride, dilation)
        for kernel, dilation in zip(kernels, dilations, strict=True)
    ]
    return jnp.concatenate(outputs, axis=1)


def _embedded(kernels: Sequence[jax.Array], dilations: Sequence[int]) -> jax.Array:
    """All kernels at the size of the largest, undilated: [states, K, size, size, channels]."""
    reaches = [kernel.shape[2] // 2 * d for kernel, d in zip(kernels, dilations, strict=True)]
    parts = []
    for kernel, dilation, reach in zip(kernels, dilations, reaches, strict=True):
        around = (max(reaches) - reach, max(reaches) - reach, dilation - 1)
        zero = jnp.zeros((), kernel.dtype)
        parts.append(lax.pad(kernel, zero, [(0, 0, 0)] * 2 + [around] * 2 + [(0, 0, 0)]))
    return jnp.concatenate(parts, axis=1)


def _by_matrix(images: jax.Array, kernels: jax.Array, stride: int) -> jax.Array:
    height, width, channels = images.shape[-3:]
    rows = taps(kernels.shape[2], height, stride).astype(kernels.dtype)
    columns = taps(kernels.shape[2], width, stride).astype(kernels.dtype)
    out = (rows.shape[1], columns.shape[1])
    matrices = jnp.einsum("ekijc,iph->cekphj", kernels, rows)
    matrices = jnp.einsum("cekphj,jqw->cekpqhw", matrices, columns)
    matrices = matrices.reshape(*matrices.shape[:3], out[0] * out[1], height * width)
    flat = images.reshape(*images.shape[:-3], height * width, channels)
    products = jnp.einsum("cekts,ensc->ekntc", matrices, flat)
    return products.reshape(*products.shape[:3], *out, channels)


def taps(size: int, length: int, stride: int) -> np.ndarray:
    """1 where tap i of output o lies on pixel p, [size, ceil(length / stride), length]."""
    at = np.arange(0, length, stride)[None] + (np.arange(size) - size // 2)[:, None]
    return (at[:, :, None] == np.arange(length)).astype(np.float32)


def _by_convolution(images: jax.Array, kernels: jax.Array, stride: int, dilation: int) -> jax.Array:
    if jax.default_backend() == "cpu":
        # A grouped kernel becomes a dense one there, all but a channel's own part of it zeros.
        one = lambda state: _grouped(state[0][None], state[1][None], stride, dilation)[0]
        return lax.map(one, (images, kernels))
    return _grouped(images, kernels, stride, dilation)


def _grouped(images: jax.Array, kernels: jax.Array, stride: int, dilation: int) -> jax.Array:
    """All states and kernels as groups of one convolution."""
    states, count, size, _, channels = kernels.shape
    # A copy of the image for each kernel: without, the outputs of a channel would have to lie side
    # by side, and be moved apart afterwards, which is as much memory and slower kernels.
    images = jnp.broadcast_to(images[:, None], (states, count, *images.shape[1:]))
    images = jnp.moveaxis(images.reshape(-1, *images.shape[2:]), 0, -2)
    kernel = jnp.moveaxis(kernels.reshape(-1, *kernels.shape[2:]), 0, -2)
    reach = (size // 2) * dilation
    filtered = lax.conv_general_dilated(
        images.reshape(*images.shape[:3], -1),
        kernel.reshape(size, size, 1, -1),
        (stride, stride),
        [(reach, reach)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=states * count * channels,
    )
    filtered = filtered.reshape(*filtered.shape[:3], states * count, channels)
    filtered = jnp.moveaxis(filtered, -2, 0)
    return filtered.reshape(states, count, *filtered.shape[1:])
