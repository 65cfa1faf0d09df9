"""Moving the content of images: mirror, scale, shear, rotate, translate as one affine map.

The content of an image is mirrored, scaled, sheared, rotated and translated, in this order and
about its centre; what comes from outside is 0. All of a policy's geometric operations cost one
bilinear interpolation together (two with flips), and the gathers in the image serve the value and
all derivatives: images are data, only the coordinates depend on x.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from bilevel_flax.outer.augmentation.operation import Operation

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("flip", "mirrored left to right or not", 1.0, 1.0, signed=False, graded=False),
        Operation("scale", "octaves, up or down", 1.0, 3.0),
        Operation("shear_x", "pixels per pixel", 0.5, 2.0),
        Operation("shear_y", "pixels per pixel", 0.5, 2.0),
        Operation("rotate", "degrees", 90.0, 180.0),
        Operation("translate_x", "fraction of the width", 0.4, 1.0),
        Operation("translate_y", "fraction of the height", 0.4, 1.0),
    )
}

Matrix = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # row-wise, each [batch], over (x, y)


def _product(a: Matrix, b: Matrix) -> Matrix:
    return (
        a[0] * b[0] + a[1] * b[2],
        a[0] * b[1] + a[1] * b[3],
        a[2] * b[0] + a[3] * b[2],
        a[2] * b[1] + a[3] * b[3],
    )


def transform(images: jax.Array, amounts: Mapping[str, jax.Array]) -> jax.Array:
    """Moves the content of every image by its own amounts.

    Args:
        images: float [batch, height, width, channels].
        amounts: by operation, float [batch] in the operation's unit; a positive rotation is
            counterclockwise, a positive translation to the right or down; a flip of .3 is a blend
            of .7 image and .3 mirror image. Others are 0.

    Returns:
        As `images`.
    """
    batch, height, width, _ = images.shape
    nothing = jnp.zeros(batch, images.dtype)
    get = lambda name: amounts.get(name, nothing)
    one = jnp.ones(batch, images.dtype)

    # Where a pixel's content came from: each map undone, the last one first.
    angle = jnp.deg2rad(get("rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    back: Matrix = (cos, -sin, sin, cos)  # y points down
    back = _product((one, nothing, -get("shear_y"), one), back)
    back = _product((one, -get("shear_x"), nothing, one), back)
    shrink = jnp.exp2(-get("scale"))
    back = (shrink * back[0], shrink * back[1], shrink * back[2], shrink * back[3])

    across = lambda values: values[:, None, None]
    x = (jnp.arange(width, dtype=float) - (width - 1) / 2).astype(images.dtype)[None, None, :]
    y = (jnp.arange(height, dtype=float) - (height - 1) / 2).astype(images.dtype)[None, :, None]
    x = x - across(width * get("translate_x"))
    y = y - across(height * get("translate_y"))
    from_x = across(back[0]) * x + across(back[1]) * y + (width - 1) / 2
    from_y = across(back[2]) * x + across(back[3]) * y + (height - 1) / 2
    if "flip" not in amounts:
        return bilinear(images, from_y, from_x)
    # Both are sampled from the data: a mirrored copy of what was sampled costs XLA twice that.
    mirrored = amounts["flip"][:, None, None, None]
    return (1 - mirrored) * bilinear(images, from_y, from_x) + mirrored * bilinear(
        images, from_y, (width - 1) - from_x
    )


def bilinear(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Images at coordinates that are no whole pixels; 0 outside.

    Args:
        images: float [batch, height, width, channels].
        y: float [batch, h, w], in pixels, 0 the first row's centre.
        x: the same along the columns.

    Returns:
        float [batch, h, w, channels].
    """
    batch, height, width, channels = images.shape
    framed = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(-1, channels)
    y, x = jnp.clip(y, -1, height) + 1, jnp.clip(x, -1, width) + 1
    top = jnp.clip(jnp.floor(y), 0, height).astype(jnp.int32)
    left = jnp.clip(jnp.floor(x), 0, width).astype(jnp.int32)
    down, right = (y - top)[..., None], (x - left)[..., None]
    first = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * ((height + 2) * (width + 2))
    corner = first + top * (width + 2) + left

    def at(rows: int, columns: int) -> jax.Array:
        return framed.at[corner + (rows * (width + 2) + columns)].get(mode="clip")

    above = (1 - right) * at(0, 0) + right * at(0, 1)
    below = (1 - right) * at(1, 0) + right * at(1, 1)
    return (1 - down) * above + down * below
