"""Convolutions that are also fast on XLA's CPU, where `lax.conv` in a scan is not.

On a CPU a 3x3 convolution of few channels is the sum of nine shifted images times a matrix: as one
matrix product over the shifts side by side it is 4 (8 channels) to 8 times (16) as fast as
`lax.conv` in a training step of 7x7 images. Elsewhere `lax.conv` is the faster one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def shifted(images: jax.Array, size: int, stride: int = 1, dilation: int = 1) -> list[jax.Array]:
    """What each of the size² taps of a kernel sees, row by row; "SAME" padding with zeros.

    Args:
        images: [batch, height, width, channels].
        size: of the kernel, odd.
        stride: between outputs.
        dilation: between taps.

    Returns:
        size² arrays [batch, ceil(height / stride), ceil(width / stride), channels].
    """
    _, height, width, _ = images.shape
    reach = (size // 2) * dilation
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    return [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(0, size * dilation, dilation)
        for column in range(0, size * dilation, dilation)
    ]


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    dilation: int = 1,
    by_shifts: bool | None = None,
) -> jax.Array:
    """A dense convolution with odd kernels and k // 2 pixels of zeros around the image.

    Args:
        images: [batch, height, width, channels].
        kernel: [size, size, channels, features].
        stride: between outputs.
        dilation: between taps.
        by_shifts: as one matrix product; None: on a CPU.

    Returns:
        [batch, ceil(height / stride), ceil(width / stride), features].
    """
    size = kernel.shape[0]
    if by_shifts is None:
        by_shifts = jax.default_backend() == "cpu"
    if size == 1:
        return images[:, ::stride, ::stride] @ kernel[0, 0]
    if by_shifts:
        taps = jnp.concatenate(shifted(images, size, stride, dilation), axis=-1)
        return taps @ kernel.reshape(-1, kernel.shape[-1])
    reach = (size // 2) * dilation
    return lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        [(reach, reach)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
