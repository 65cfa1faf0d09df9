"""Operations on signals [batch, time, channels]: shifts, amplitude, masks of time and frequency.

Shifts are exact for any amount, not only whole samples: phases in the spectrum, and for
frequencies the analytic signal turned in the complex plane.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from bilevel_flax.outer.augmentation.operation import Operation

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("time_shift", "fraction of the length, around the end", 0.4, 0.5),
        Operation("frequency_shift", "cycles per sample", 0.15, 0.25),
        Operation("amplitude", "octaves, up or down", 2.0, 6.0),
        Operation("sign_flip", "sign changed or not", 1.0, 1.0, signed=False, graded=False),
        Operation(
            "frequency_mask",
            "width of the band, fraction of all frequencies",
            0.5,
            1.0,
            signed=False,
        ),
        Operation("time_mask", "duration, fraction of the length", 0.5, 1.0, signed=False),
        Operation("signal_noise", "standard deviation, as the signal's", 1.0, 4.0, signed=False),
    )
}
_EDGE = 0.02  # of masks, as a fraction of what they are cut from


def _each(values: jax.Array) -> jax.Array:
    return values[:, None, None]


def time_shift(signals: jax.Array, amount: jax.Array) -> jax.Array:
    """Later by a fraction of the length; what leaves at the end comes in at the start."""
    length = signals.shape[1]
    spectrum = jnp.fft.rfft(signals, axis=1)
    cycles = jnp.arange(spectrum.shape[1], dtype=signals.dtype)[None, :]
    phase = -2 * jnp.pi * cycles * amount[:, None]
    turn = jax.lax.complex(jnp.cos(phase), jnp.sin(phase))[:, :, None]
    return jnp.fft.irfft(spectrum * turn, n=length, axis=1).astype(signals.dtype)


def frequency_shift(signals: jax.Array, amount: jax.Array) -> jax.Array:
    """All frequencies higher by so many cycles per sample."""
    length = signals.shape[1]
    # The analytic signal has the positive frequencies only, twice.
    factor = jnp.zeros(length).at[0].set(1.0).at[1 : (length + 1) // 2].set(2.0)
    if length % 2 == 0:
        factor = factor.at[length // 2].set(1.0)
    spectrum = jnp.fft.fft(signals, axis=1) * factor[None, :, None].astype(signals.dtype)
    analytic = jnp.fft.ifft(spectrum, axis=1)
    phase = 2 * jnp.pi * amount[:, None] * jnp.arange(length, dtype=signals.dtype)[None, :]
    turned = jnp.cos(phase)[:, :, None] * analytic.real - jnp.sin(phase)[:, :, None] * analytic.imag
    return turned.astype(signals.dtype)


def amplitude(signals: jax.Array, amount: jax.Array) -> jax.Array:
    """Times 2^amount."""
    return signals * _each(jnp.exp2(amount))


def sign_flip(signals: jax.Array, amount: jax.Array) -> jax.Array:
    """A blend of signal and its negative; an amount of 1 is the negative."""
    return signals * _each(1 - 2 * amount)


def _covered(size: int, width: jax.Array, key: jax.Array) -> jax.Array:
    """[batch, size], 1 in a band of each one's width around a random place, with soft edges."""
    places = ((jnp.arange(size) + 0.5) / size).astype(width.dtype)[None, :]
    centre = jax.random.uniform(key, width.shape, width.dtype)[:, None]
    edge = max(_EDGE, 1 / size)  # narrower than a sample, most widths would have no derivative
    return jnp.clip((width[:, None] / 2 - jnp.abs(places - centre)) / edge, 0, 1)


def frequency_mask(signals: jax.Array, amount: jax.Array, key: jax.Array) -> jax.Array:
    """Takes a band of frequencies out."""
    spectrum = jnp.fft.rfft(signals, axis=1)
    passed = 1 - _covered(spectrum.shape[1], amount, key)
    return jnp.fft.irfft(spectrum * passed[:, :, None], n=signals.shape[1], axis=1).astype(
        signals.dtype
    )


def time_mask(signals: jax.Array, amount: jax.Array, key: jax.Array) -> jax.Array:
    """Takes a stretch of time out."""
    return signals * (1 - _covered(signals.shape[1], amount, key))[:, :, None]


def signal_noise(signals: jax.Array, amount: jax.Array, key: jax.Array) -> jax.Array:
    """Adds white noise, its deviation a multiple of the signal's own."""
    scale = jnp.sqrt(jnp.mean(signals**2, (1, 2), keepdims=True))
    white = jax.random.normal(key, signals.shape, signals.dtype)
    return signals + _each(amount) * scale * white


_PLAIN = {
    "time_shift": time_shift,
    "frequency_shift": frequency_shift,
    "amplitude": amplitude,
    "sign_flip": sign_flip,
}
_RANDOM = {
    "frequency_mask": frequency_mask,
    "time_mask": time_mask,
    "signal_noise": signal_noise,
}


def transform(signals: jax.Array, amounts: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    """Applies the operations that have an amount, in the order of `OPERATIONS`.

    Args:
        signals: float [batch, time, channels].
        amounts: by operation, float [batch], in the operation's unit.
        key: of noise and of the masks' places.

    Returns:
        As `signals`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilevel_flax.outer import augmentation
        >>> signals, nothing = jnp.ones((1, 16, 1)), {"amplitude": jnp.zeros(1)}
        >>> augmentation.transform_signals(signals, nothing, jax.random.key(0)).shape
        (1, 16, 1)
    """
    for number, name in enumerate(OPERATIONS):
        if name in amounts and name in _PLAIN:
            signals = _PLAIN[name](signals, amounts[name])
        elif name in amounts:
            signals = _RANDOM[name](signals, amounts[name], jax.random.fold_in(key, number))
    return signals
