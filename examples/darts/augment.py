"""Random changes of training images: cutout, shifts, mirroring."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cut_out(rng: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """A square of zeros around a random pixel of each image; what lies outside is lost.

    Args:
        rng: key.
        images: [batch, height, width, channels].
        side: of the square, in pixels.

    References:
        T. DeVries, G. W. Taylor. Improved regularization of convolutional neural networks with
        cutout. arXiv 1708.04552, 2017.
    """
    count, height, width, _ = images.shape

    def inside(key, length):
        first = jax.random.randint(key, (count, 1), 0, length) - side // 2
        pixel = jnp.arange(length)[None]
        return (pixel >= first) & (pixel < first + side)

    rows, columns = (
        inside(key, n) for key, n in zip(jax.random.split(rng), (height, width), strict=True)
    )
    square = rows[:, :, None] & columns[:, None, :]
    return jnp.where(square[..., None], jnp.zeros((), images.dtype), images)


def shifted(rng: jax.Array, images: jax.Array, most: int) -> jax.Array:
    """Each image moved by up to `most` pixels each way, zeros coming in.

    Args:
        rng: key.
        images: [batch, height, width, channels].
        most: pixels.
    """
    _, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    corners = jax.random.randint(rng, (len(images), 2), 0, 2 * most + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(
        image, (at[0], at[1], 0), (height, width, channels)
    )
    return jax.vmap(cut)(padded, corners)


def mirrored(rng: jax.Array, images: jax.Array) -> jax.Array:
    """Left and right changed in half of the images [batch, height, width, channels]."""
    flip = jax.random.bernoulli(rng, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)
