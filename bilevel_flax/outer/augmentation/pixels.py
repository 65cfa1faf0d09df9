"""Operations on the values of pixels, in [0, 1]: brightness, contrast, posterize and so on.

Posterize and solarize take steps, whose derivative is 0 or nothing at all. Their values are exact
and their derivatives those of a surrogate, which their functions state.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from bilevel_flax.outer.augmentation.operation import Operation

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("brightness", "added to pixels in [0, 1]", 0.5, 1.0),
        Operation("contrast", "relative change of the distance to the mean", 0.9, 1.0),
        Operation("posterize", "bits taken away of 8", 7.0, 7.0, signed=False),
        Operation(
            "solarize", "share of [0, 1] that is inverted, from above", 1.0, 1.0, signed=False
        ),
        Operation("noise", "standard deviation, pixels in [0, 1]", 0.5, 1.0, signed=False),
        Operation("cutout", "side of the square, fraction of the image's", 0.7, 1.0, signed=False),
    )
}
_SOFTNESS = 0.1  # of solarize's surrogate, in units of brightness


def _each(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


def _with_gradient_of(surrogate: jax.Array, value: jax.Array) -> jax.Array:
    return surrogate + jax.lax.stop_gradient(value - surrogate)


def brightness(images: jax.Array, amount: jax.Array) -> jax.Array:
    """Adds the amount, within [0, 1]."""
    return jnp.clip(images + _each(amount), 0, 1)


def contrast(images: jax.Array, amount: jax.Array, mean: jax.Array) -> jax.Array:
    """Distances from each image's mean [batch] times 1 + amount, within [0, 1]."""
    middle = _each(mean)
    return jnp.clip(middle + _each(1 + amount) * (images - middle), 0, 1)


def posterize(images: jax.Array, amount: jax.Array) -> jax.Array:
    """Rounds to 2^(8 - amount) levels.

    Surrogate: with the n = 2^(8 - a) - 1 steps between levels and the rounding's residual
    r = round(n p) - n p held fixed, (n p + r) / n: identity in the pixel p, and in n the
    derivative -r / n².

    References:
        S. K. Esser et al. Learned step size quantization. ICLR 2020.
    """
    steps = _each(jnp.exp2(8 - amount) - 1)
    scaled = images * steps
    return _with_gradient_of(scaled, jnp.round(scaled)) / steps


def solarize(images: jax.Array, amount: jax.Array) -> jax.Array:
    """Inverts pixels above 1 - amount.

    Surrogate: p + σ((p - 1 + a) / .1) (1 - 2p), the threshold smoothed.
    """
    threshold = _each(1 - amount)
    inverted = 1 - 2 * images
    soft = images + jax.nn.sigmoid((images - threshold) / _SOFTNESS) * inverted
    return _with_gradient_of(soft, jnp.where(images > threshold, 1 - images, images))


def noise(images: jax.Array, amount: jax.Array, key: jax.Array) -> jax.Array:
    """Adds white noise of the amount's standard deviation, within [0, 1].

    Uniform, not Gaussian: XLA computes a draw again for each of its uses, and the Gaussian's
    inverse error function cost as much on a CPU as all other operations together.
    """
    white = jax.random.uniform(key, images.shape, images.dtype, -(3**0.5), 3**0.5)
    return jnp.clip(images + _each(amount) * white, 0, 1)


def cutout(images: jax.Array, amount: jax.Array, key: jax.Array) -> jax.Array:
    """Blackens a square at a random place; its edges fade over a pixel, so its side is learned."""
    batch, height, width, _ = images.shape
    centres = jax.random.uniform(key, (2, batch), images.dtype)

    def covered(centre, size):
        place = jnp.arange(size, dtype=images.dtype)[None, :]
        half = (amount * size / 2)[:, None]
        return jnp.clip(half - jnp.abs(place - (size * centre - 0.5)[:, None]), 0, 1)

    rows, columns = covered(centres[0], height), covered(centres[1], width)
    return images * (1 - rows[:, :, None, None] * columns[:, None, :, None])


def transform(
    images: jax.Array, amounts: Mapping[str, jax.Array], mean: jax.Array, key: jax.Array
) -> jax.Array:
    """Applies the operations that have an amount, in the order of `OPERATIONS`.

    Args:
        images: float [batch, height, width, channels], values in [0, 1].
        amounts: by operation, float [batch], in the operation's unit.
        mean: float [batch], what contrast counts as each image's middle. That of the image as it
            was: a mean of `images` would make XLA compute all that led to them twice.
        key: of the noise and of cutout's place.

    Returns:
        As `images`.
    """
    steps = {
        "brightness": brightness,
        "contrast": functools.partial(contrast, mean=mean),
        "posterize": posterize,
        "solarize": solarize,
        "noise": functools.partial(noise, key=jax.random.fold_in(key, 0)),
        "cutout": functools.partial(cutout, key=jax.random.fold_in(key, 1)),
    }
    for name, step in steps.items():
        if name in amounts:
            images = step(images, amounts[name])
    return images
