"""Two kinds of bursts in noise, as in EEG, each with an invariance of its own.

A burst has a time and a frequency, in training one of each for each class. In validation and test

* signals of class "early" are shifted in time;
* signals of class "fast" are shifted in frequency.

The variation of one class, given to the other as well, would make the two alike: it hurts. The
whole signal is shifted, background included; were it the burst alone, a shifted background would
give the class away in training and be missing in validation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.outer import augmentation
from bilevel_flax.train.config import ConfigError
from examples.augmentation.examples import Examples, Part

LENGTH, CHANNELS = 128, 2
CLASSES = ("early", "fast")
# Centres in training: time as a fraction of the length, frequency in cycles per sample.
TIME = (0.42, 0.58)
FREQUENCY = (0.16, 0.19)
# Half-widths in validation and test, by class.
TIME_SHIFT = (0.3, 0.0)
FREQUENCY_SHIFT = (0.0, 0.08)
SPLITS = (1000, 2000, 4000)
_DURATION = 0.08  # deviation of a burst's envelope, as a fraction of the length
_NOISE = 0.4  # deviation of the background; a burst has height 1
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
    labels = rng.permutation(np.arange(count) % len(CLASSES)).astype(np.int32)
    centre, frequency = (np.take(values, labels)[:, None, None] for values in (TIME, FREQUENCY))
    time = np.arange(LENGTH)[None, :, None]
    phase = rng.uniform(0, 2 * np.pi, (count, 1, CHANNELS))
    height = 2.0 ** (_RANGE * rng.normal(size=(count, 1, CHANNELS)))
    envelope = np.exp(-0.5 * ((time / LENGTH - centre) / _DURATION) ** 2)
    bursts = height * envelope * np.cos(2 * np.pi * frequency * time + phase)
    signals = jnp.asarray(bursts + background(rng, count), jnp.float32)
    if moved:
        shift = rng.uniform(-1, 1, (2, count))
        amounts = {
            "time_shift": shift[0] * np.take(TIME_SHIFT, labels),
            "frequency_shift": shift[1] * np.take(FREQUENCY_SHIFT, labels),
        }
        amounts = {name: jnp.asarray(each, jnp.float32) for name, each in amounts.items()}
        signals = augmentation.transform_signals(signals, amounts, jax.random.key(0))
    return np.asarray(signals), labels


def background(rng: np.random.Generator, count: int) -> np.ndarray:
    """Noise whose power falls as one over the frequency, [count, time, channels]."""
    spectrum = np.fft.rfft(rng.normal(size=(count, LENGTH, CHANNELS)), axis=1)
    spectrum /= np.sqrt(np.arange(spectrum.shape[1]).clip(1))[:, None]
    noise = np.fft.irfft(spectrum, n=LENGTH, axis=1)
    return _NOISE * noise / noise.std()
