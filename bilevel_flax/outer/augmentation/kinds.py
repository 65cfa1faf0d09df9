"""Policies for images and for signals: which operations there are, and how they are applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from bilevel_flax.outer.augmentation import geometry, operation, pixels, signals
from bilevel_flax.outer.augmentation.policy import Policy

IMAGE_OPERATIONS = {**geometry.OPERATIONS, **pixels.OPERATIONS}
SIGNAL_OPERATIONS = signals.OPERATIONS


def transform_images(
    images: jax.Array, amounts: Mapping[str, jax.Array], key: jax.Array
) -> jax.Array:
    """Applies operations to images: the geometric ones as one map, then those on pixels.

    Args:
        images: float [batch, height, width, channels], values in [0, 1].
        amounts: by operation, float [batch], in the operation's unit; those that are not named are
            left out.
        key: of noise and of cutout's place.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilevel_flax.outer import augmentation
        >>> images, amounts = jnp.full((1, 2, 2, 1), 0.5), {"brightness": jnp.array([0.25])}
        >>> brighter = augmentation.transform_images(images, amounts, jax.random.key(0))
        >>> brighter[0, :, :, 0].tolist()
        [[0.75, 0.75], [0.75, 0.75]]
    """
    mean = images.mean((1, 2, 3))
    if any(name in geometry.OPERATIONS for name in amounts):
        # What follows uses the result several times; without this XLA interpolates anew each time.
        images = jax.lax.optimization_barrier(geometry.transform(images, amounts))
    return pixels.transform(images, amounts, mean, key)


def image_policy(
    operations: Sequence[str] = tuple(IMAGE_OPERATIONS),
    *,
    limits: Mapping[str, float | None] | None = None,
    num_classes: int | None = None,
    magnitude: float = 0.2,
    probability: float = 0.5,
    temperature: float = 0.2,
    hard: bool = False,
) -> Policy:
    """A policy for images.

    Args:
        operations: names out of `IMAGE_OPERATIONS`.
        limits: the largest magnitude by operation, in its unit; those not given: the operation's.
        num_classes: learn magnitudes and probabilities for each class.
        magnitude: where all start, as a fraction of the limits, in (0, 1). By symmetry a magnitude
            of 0 is a stationary point of most operations, so it is no place to start.
        probability: where all start, in (0, 1).
        temperature: of the relaxed draws, > 0.
        hard: draw from {0, 1} and differentiate the relaxed draw (straight-through).

    Raises:
        ValueError: an unknown operation, a limit or a start out of range.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> policy = bf.outer.image_policy(("rotate", "flip"), limits={"rotate": 45.0})
        >>> x = policy.init()
        >>> policy.apply(x, jnp.ones((8, 28, 28, 1)), jax.random.key(0)).shape
        (8, 28, 28, 1)
        >>> x = policy.at({"rotate": {"magnitude": 30.0, "probability": 0.9}})
        >>> round(policy.learned(x)["rotate"]["magnitude"], 3)
        30.0
    """
    picked = operation.chosen(IMAGE_OPERATIONS, operations)
    return Policy(
        picked,
        operation.limits_of(picked, limits or {}),
        num_classes,
        magnitude,
        probability,
        temperature,
        hard,
        4,
        transform_images,
    )


def signal_policy(
    operations: Sequence[str] = tuple(SIGNAL_OPERATIONS),
    *,
    limits: Mapping[str, float | None] | None = None,
    num_classes: int | None = None,
    magnitude: float = 0.2,
    probability: float = 0.5,
    temperature: float = 0.2,
    hard: bool = False,
) -> Policy:
    """A policy for signals [batch, time, channels]; as `image_policy`.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> policy = bf.outer.signal_policy(("time_shift", "amplitude"), num_classes=2)
        >>> labels = jnp.array([0, 1, 1])
        >>> policy.apply(policy.init(), jnp.ones((3, 64, 2)), jax.random.key(0), labels).shape
        (3, 64, 2)
    """
    picked = operation.chosen(SIGNAL_OPERATIONS, operations)
    return Policy(
        picked,
        operation.limits_of(picked, limits or {}),
        num_classes,
        magnitude,
        probability,
        temperature,
        hard,
        3,
        signals.transform,
    )
