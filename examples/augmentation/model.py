"""The networks: for images those of hypercleaning, for signals a spectrogram and a hidden layer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.train.config import ConfigError, nearest
from examples.mnist_hypercleaning.model import CNN, MLP, Linear

_FRAME, _HOP = 32, 8  # samples
_FLOOR = 0.1  # power below which a spectrogram is flat


class Spectrum(nn.Module):
    """Logarithms of the power by time and frequency, one hidden layer of 64 ReLUs."""

    num_classes: int
    hidden: int = 64
    stateful: bool = False

    @nn.compact
    def __call__(self, signals: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of signals [batch, time, channels]."""
        del train
        starts = range(0, signals.shape[1] - _FRAME + 1, _HOP)
        frames = jnp.stack([signals[:, at : at + _FRAME] for at in starts], 1)
        angle = 2 * np.pi * np.outer(np.arange(_FRAME), np.arange(_FRAME // 2 + 1)) / _FRAME
        window = np.hanning(_FRAME)[:, None]
        bases = [(window * wave(angle)).astype(np.float32) for wave in (np.cos, np.sin)]
        power = sum(jnp.einsum("bfsc,sk->bfkc", frames, basis) ** 2 for basis in bases)
        features = jnp.log(_FLOOR + jnp.asarray(power)).reshape(len(signals), -1)
        hidden = nn.relu(nn.Dense(self.hidden)(features))
        return nn.Dense(self.num_classes)(hidden)


MODELS = {"images": {"cnn": CNN, "mlp": MLP, "linear": Linear}, "signals": {"spectrum": Spectrum}}


def make_model(name: str | None, kind: str, num_classes: int) -> nn.Module:
    """The network called `name`.

    Args:
        name: None: the first of its kind.
        kind: `images` or `signals`.
        num_classes: classes.

    Raises:
        ConfigError: no such network for this kind; the nearest is named.
    """
    known = MODELS[kind]
    name = next(iter(known)) if name is None else name
    if name not in known:
        raise ConfigError(
            f"--config.model={name}: choose one of {', '.join(known)} for {kind}"
            f"{nearest(name, list(known))}"
        )
    return known[name](num_classes)
