"""The digits of the micro-space: 14x14 means of 2x2 pixels, standardised."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from examples.datasets import sources

SIDE = 14


class Digits(NamedTuple):
    """Images float32 [n, 14, 14, 1] and labels int32 [n]."""

    image: np.ndarray
    label: np.ndarray


def small(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 28, 28, 1] as float32 [n, 14, 14, 1]: means of 2x2 pixels."""
    return images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4), dtype=np.float32)[..., None]


@functools.cache
def all_digits() -> Digits:
    """The 5,000 digits of mnist5k (from MNIST's training part), before standardising."""
    loaded = sources.load("mnist5k", splits=(5000, 0, 0))
    return Digits(small(loaded.train_images), loaded.train_labels)


def test_digits(manual_dir: str | None, data_dir: str | None = None) -> Digits:
    """MNIST's 10,000 test digits, before standardising.

    Args:
        manual_dir: folder of the original files.
        data_dir: folder of prepared sets; None: TFDS's.

    Raises:
        ValueError: the files are not there, or damaged.
    """
    loaded = sources.load("mnist", manual_dir=manual_dir, data_dir=data_dir, splits=(1, 0, 10_000))
    return Digits(small(loaded.test_images), loaded.test_labels)


def standardized(digits: Digits, by: Digits) -> Digits:
    """The digits in units of the deviation of the pixels of `by`, around their mean."""
    mean, deviation = by.image.mean(), by.image.std()
    return Digits((digits.image - mean) / deviation, digits.label)
