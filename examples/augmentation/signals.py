"""Two kinds of bursts in noise, as in EEG, each with an invariance of its own.

A burst has a time and a frequency. In training both kinds have one of each; in validation and test

* bursts of class "early" come at other times, at the same frequency;
* bursts of class "fast" have other frequencies, at the same time.

Where the two lines cross in the plane of time and frequency the classes cannot be told apart, and
the other class's variation would cover all of a class's line: it hurts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bilevel_flax.config import ConfigError
from examples.augmentation.examples import Examples, Part

LENGTH, CHANNELS = 128, 2
CLASSES = ("early", "fast")
# Centres in training: time as a fraction of the length, frequency in cycles per sample.
TIME = (0.35, 0.5)
FREQUENCY = (0.12, 0.15)
# Half-widths in validation and test, by class.
TIME_SHIFT = (0.25, 0.0)
FREQUENCY_SHIFT = (0.0, 0.06)
SPLITS = (500, 1000, 2000)
_DURATION = 0.08  # deviation of a burst's envelope, as a fraction of the length
_NOISE = 0.3  # deviation of the background; a burst has height 1
_RANGE = 0.5  # octaves, deviation of the bursts' heights


def load(config: Any) -> Examples:
    """Signals float32 [n, time, channels], drawn from the run's seed.

    Args:
        config: keys `planted`, `seed` and `data.splits`.

    Raises:
        ConfigError: a plan for images, sizes that are none.
    """
    if config.planted != "none":
        raise ConfigError(
            f"--config.planted={config.planted}: for images; signals have their own planted "
            "invariances, leave it out"
        )
    splits = tuple(config.data.splits or SPLITS)
    if len(splits) != 3 or not all(isinstance(size, int) and size > 0 for size in splits):
        raise ConfigError(f"--config.data.splits={splits}: give three sizes above 0")
    rng = np.random.default_rng(config.seed)
    train, validation, test = (
        draw(rng, size, moved=number > 0) for number, size in enumerate(splits)
    )
    share = [float(shift > 0) for shift in TIME_SHIFT], [float(s > 0) for s in FREQUENCY_SHIFT]
    return Examples(
        train=train,
        validation=validation,
        test=test,
        num_classes=len(CLASSES),
        class_names=CLASSES,
        planted={
            "time_shift": {"magnitude": list(TIME_SHIFT), "probability": share[0]},
            "frequency_shift": {"magnitude": list(FREQUENCY_SHIFT), "probability": share[1]},
        },
        mean=0.0,
        deviation=1.0,
    )


def draw(rng: np.random.Generator, count: int, *, moved: bool) -> Part:
    """(signals [count, time, channels], labels [count]); `moved`: with the planted variation."""
    labels = (np.arange(count) % len(CLASSES)).astype(np.int32)
    labels = rng.permutation(labels)
    shift = rng.uniform(-1, 1, (2, count)) * float(moved)
    centre = np.take(TIME, labels) + shift[0] * np.take(TIME_SHIFT, labels)
    frequency = np.take(FREQUENCY, labels) + shift[1] * np.take(FREQUENCY_SHIFT, labels)
    time = np.arange(LENGTH)[None, :, None]
    phase = rng.uniform(0, 2 * np.pi, (count, 1, CHANNELS))
    height = 2.0 ** (_RANGE * rng.normal(size=(count, 1, CHANNELS)))
    envelope = np.exp(-0.5 * ((time / LENGTH - centre[:, None, None]) / _DURATION) ** 2)
    bursts = height * envelope * np.cos(2 * np.pi * frequency[:, None, None] * time + phase)
    return (bursts + background(rng, count)).astype(np.float32), labels


def background(rng: np.random.Generator, count: int) -> np.ndarray:
    """Noise whose power falls as one over the frequency, [count, time, channels]."""
    spectrum = np.fft.rfft(rng.normal(size=(count, LENGTH, CHANNELS)), axis=1)
    spectrum /= np.sqrt(np.arange(spectrum.shape[1]).clip(1))[:, None]
    noise = np.fft.irfft(spectrum, n=LENGTH, axis=1)
    return _NOISE * noise / noise.std()
