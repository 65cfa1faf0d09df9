"""The networks of the hypercleaning task: images in, logits out."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax.train.config import check_choice


class Linear(nn.Module):
    """The published model: one matrix, no bias."""

    num_classes: int
    stateful: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, h, w, c]."""
        del train
        flat = images.reshape(len(images), -1)
        return nn.Dense(self.num_classes, use_bias=False, kernel_init=nn.initializers.zeros)(flat)


class MLP(nn.Module):
    """One hidden layer of 256 ReLUs."""

    num_classes: int
    hidden: int = 256
    stateful: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, h, w, c]."""
        del train
        hidden = nn.relu(nn.Dense(self.hidden)(images.reshape(len(images), -1)))
        return nn.Dense(self.num_classes)(hidden)


class StridedConv(nn.Module):
    """A 3x3 convolution of stride 2 with SAME padding, as one product of the image's patches.

    On a CPU, XLA runs convolutions inside a compiled loop ten times slower than this: 120 ms
    against 12 ms for a step of this network (outside a loop 13 ms).
    """

    channels: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Float [batch, ceil(h/2), ceil(w/2), channels] of [batch, h, w, c]."""
        padding, lengths = [(0, 0)], []
        for size in images.shape[1:3]:
            out = -(-size // 2)
            total = max(2 * out + 1 - size, 0)
            padding.append((total // 2, total - total // 2))
            lengths.append(2 * out - 1)
        padded = jnp.pad(images, [*padding, (0, 0)])
        height, width = lengths
        patches = [
            padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)
        ]
        return nn.Dense(self.channels, use_bias=False)(jnp.concatenate(patches, axis=-1))


class CNN(nn.Module):
    """Two strided convolutions with BatchNorm, a hidden layer with dropout."""

    num_classes: int
    dropout: float = 0.25
    stateful: bool = True  # BatchNorm's statistics, dropout's key

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, h, w, c]; `train` selects the mode."""
        out = images
        for channels in (16, 32):
            out = StridedConv(channels)(out)
            out = nn.relu(nn.BatchNorm(use_running_average=not train)(out))
        out = nn.relu(nn.Dense(64)(out.reshape(len(out), -1)))
        out = nn.Dropout(self.dropout, deterministic=not train)(out)
        return nn.Dense(self.num_classes)(out)


MODELS = {"linear": Linear, "mlp": MLP, "cnn": CNN}


def make_model(name: str, num_classes: int) -> nn.Module:
    """The network called `name`.

    Raises:
        ConfigError: no such network; the nearest is named.
    """
    check_choice(f"--config.model={name}", name, MODELS)
    return MODELS[name](num_classes)


@functools.partial(jax.jit, static_argnums=0)
def _judge(model: nn.Module, params, model_state, images, labels) -> tuple[jax.Array, jax.Array]:
    logits = jnp.asarray(model.apply({"params": params, **model_state}, images, train=False))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.argmax(logits, axis=-1) != labels, losses


def _judge_all(model: nn.Module, state: bf.TrainState, images: np.ndarray, labels: np.ndarray):
    variables = (state.inner_params, state.model_state or {})
    parts = [
        _judge(model, *variables, images[i : i + 5000], labels[i : i + 5000])
        for i in range(0, len(labels), 5000)
    ]
    return (np.concatenate(column) for column in zip(*parts, strict=True))


def error(model: nn.Module, state: bf.TrainState, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that the network gets wrong, in [0, 1]."""
    wrong, _ = _judge_all(model, state, images, labels)
    return float(wrong.mean())


def losses(
    model: nn.Module, state: bf.TrainState, images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """The cross entropy of every image, float32 [n], with dropout off."""
    _, values = _judge_all(model, state, images, labels)
    return values
