"""Networks of the sizes that accelerators are measured with, each with a weight for 8 domains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from examples.language_model.model import Decoder, Size
from examples.mnist_hypercleaning.model import make_model

DOMAINS = 8


class Network(NamedTuple):
    """A network and one minibatch of each side.

    Attributes:
        losses: `losses(z, batch, model_state) -> (losses [batch], model_state)`.
        init: `init() -> (z, model_state)`; None where there is no state.
        batch: float32 and integer arrays.
        items: tokens or images of one side.
    """

    losses: Callable[..., Any]
    init: Callable[[], tuple[Any, Any]]
    batch: dict
    items: int

    def inner(self, z: Any, x: Any, batch: Any, state: Any = None):
        """`(G, state)`, domains weighed by a softmax of x."""
        losses, state = self.losses(z, batch, state)
        return jnp.mean(jax.nn.softmax(x)[batch["domain"]] * DOMAINS * losses), state

    def outer(self, z: Any, x: Any, batch: Any, state: Any = None):
        """`(F, state)`."""
        del x
        losses, state = self.losses(z, batch, state)
        return jnp.mean(losses), state

    def problem(self, stateful: bool) -> bf.Problem:
        """The two losses for the library."""
        if not stateful:
            drop = lambda loss: lambda z, x, batch: loss(z, x, batch)[0]
            return bf.Problem(drop(self.inner), drop(self.outer))

        def with_aux(loss):
            def stateful_loss(z, x, batch, state, rng):
                del rng
                value, state = loss(z, x, batch, state)
                return value, bf.Aux(state)

            return stateful_loss

        return bf.Problem(with_aux(self.inner), with_aux(self.outer), stateful=True)


def _domains(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32) % DOMAINS


def decoder(
    size: Size, batch: int, length: int, dtype: Any, remat: bool, attention: Any = None
) -> Network:
    """`examples/language_model`'s decoder on random tokens."""
    model = Decoder(size, dtype, remat, attention)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, size.vocabulary, (batch, length + 1), dtype=np.int32)

    def losses(z, batch, state):
        return jnp.asarray(model.apply({"params": z}, batch["tokens"])).mean(-1), state

    def init():
        return jax.jit(model.init)(jax.random.key(0), tokens[:1])["params"], None

    return Network(losses, init, {"tokens": tokens, "domain": _domains(batch)}, batch * length)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut (ResNet v1.5)."""

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, h, w, c] -> [batch, h / stride, w / stride, 4 width]."""
        convolution = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=False, dtype=self.dtype)
        out = nn.relu(norm()(convolution(self.width, (1, 1))(x)))
        out = nn.relu(norm()(convolution(self.width, (3, 3), self.stride)(out)))
        out = norm(scale_init=nn.initializers.zeros)(convolution(4 * self.width, (1, 1))(out))
        if x.shape != out.shape:
            x = norm()(convolution(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + out)


class ResNet(nn.Module):
    """Stages of bottlenecks on a strided stem; (3, 4, 6, 3) of width 64 are ResNet-50.

    References:
        K. He, X. Zhang, S. Ren, J. Sun. Deep residual learning for image recognition. CVPR 2016.
    """

    stages: Sequence[int]
    width: int
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, float32 [batch, classes]."""
        x = nn.Conv(self.width, (7, 7), 2, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.stages):
            for i in range(count):
                stride = 2 if i == 0 and stage else 1
                x = Bottleneck(self.width * 2**stage, stride, self.dtype)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)).astype(jnp.float32))


def _classifier(model: nn.Module, image: tuple[int, ...], batch: int, classes: int, **modes: Any):
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(batch, *image)).astype(np.float32),
        "label": rng.integers(0, classes, batch).astype(np.int32),
        "domain": _domains(batch),
    }

    def losses(z, batch, state):
        variables = {"params": z, **state}
        logits, state = model.apply(variables, batch["image"], mutable=["batch_stats"], **modes)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return each, dict(state)

    def init():
        variables = dict(
            jax.jit(functools.partial(model.init, **modes))(jax.random.key(0), arrays["image"][:2])
        )
        return variables.pop("params"), variables

    return Network(losses, init, arrays, batch)


def resnet(stages: Sequence[int], width: int, side: int, batch: int, dtype: Any) -> Network:
    """A ResNet on random images, with BatchNorm."""
    classes = 1000 if len(stages) > 1 else 10
    model = ResNet(tuple(stages), width, classes, dtype)
    return _classifier(model, (side, side, 3), batch, classes)


def small_cnn(batch: int) -> Network:
    """The CNN of `examples/mnist_hypercleaning`, its dropout off."""
    model = make_model("cnn", 10).clone(dropout=0.0)
    return _classifier(model, (28, 28, 1), batch, 10, train=True)
