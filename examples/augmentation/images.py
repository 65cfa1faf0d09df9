"""Digits (or any TFDS image set) with few training examples, and a planted invariance.

Planted means: validation and test images are rotated or shifted at random, training images are
not. A policy that finds out gives the training images the same variation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.outer import augmentation
from bilevel_flax.train.config import ConfigError, check_choice
from examples.augmentation.examples import Examples
from examples.datasets import sources

# Amounts are uniform in ± these, in the operations' units.
PLANTED = {
    "none": {},
    "rotate": {"rotate": 60.0},
    "shift": {"translate_x": 0.2, "translate_y": 0.2},
}
# Few to train on, more to learn a policy from and to measure with.
SPLITS = {"mnist5k": (1000, 1500, 2500)}
OTHER_SPLITS = (1000, 2000, 10_000)
_AT_ONCE = 1000


def load(config: Any) -> Examples:
    """The images that `config` asks for, scaled to [0, 1].

    Args:
        config: keys `planted`, `seed` and `data` (`name`, `manual_dir`, `data_dir`, `splits`,
            `size`).

    Raises:
        ConfigError: an unknown plan, a size that is none, a part without examples.
        ValueError: as `data.load`.
    """
    check_choice(f"--config.planted={config.planted}", config.planted, PLANTED)
    name = config.data.name
    splits = config.data.splits or SPLITS.get(name, OTHER_SPLITS)
    images = sources.load(
        name,
        manual_dir=config.data.manual_dir,
        data_dir=config.data.data_dir,
        splits=splits,
        seed=config.seed,
    )
    parts = {}
    for number, part in enumerate(("train", "validation", "test")):
        pixels = smaller(getattr(images, f"{part}_images"), config.data.size)
        if not len(pixels):
            raise ConfigError(f"--config.data.splits={splits}: no {part} examples")
        if part != "train":
            pixels = varied(pixels, PLANTED[config.planted], seed=100 * config.seed + number)
        parts[part] = (pixels, getattr(images, f"{part}_labels"))
    train = parts["train"][0]
    return Examples(
        **parts,
        num_classes=images.num_classes,
        class_names=images.class_names,
        planted={
            operation: {"magnitude": magnitude, "probability": 1.0}
            for operation, magnitude in PLANTED[config.planted].items()
        },
        mean=round(float(train.mean()), 1),  # rounded: all seeds share one compiled program
        deviation=round(float(train.std()), 1),
    )


def smaller(images: np.ndarray, size: int | None) -> np.ndarray:
    """Images uint8 [n, h, w, c] as float32 in [0, 1], means of whole blocks of pixels.

    Args:
        images: uint8.
        size: the height and width to come to; None: as they are.

    Raises:
        ConfigError: the size does not divide the images' own.
    """
    count, height, width, channels = images.shape
    rows, columns = (height, width) if size is None else (size, size)
    if rows < 1 or height % rows or width % columns:
        raise ConfigError(
            f"--config.data.size={size}: must divide the images' {height} x {width} pixels"
        )
    blocks = images.reshape(count, rows, height // rows, columns, width // columns, channels)
    return blocks.mean((2, 4), dtype=np.float32) / np.float32(255)


def varied(images: np.ndarray, magnitudes: dict[str, float], *, seed: int) -> np.ndarray:
    """Every image with amounts of its own, uniform in ± the magnitudes."""
    if not magnitudes:
        return images
    rng = np.random.default_rng(seed)
    amounts = {
        name: rng.uniform(-magnitude, magnitude, len(images)).astype(np.float32)
        for name, magnitude in magnitudes.items()
    }
    done = [
        augmentation.transform_images(
            jnp.asarray(images[at : at + _AT_ONCE]),
            {name: jnp.asarray(each[at : at + _AT_ONCE]) for name, each in amounts.items()},
            jax.random.key(0),  # nothing that draws is planted
        )
        for at in range(0, len(images), _AT_ONCE)
    ]
    return np.concatenate([np.asarray(part) for part in done])
