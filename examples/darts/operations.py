"""The operations an edge of a cell chooses from.

Each is a Flax module `operation(images, train) -> images` on [batch, height, width, channels] with
the same channels out; with stride 2 (all but the identity) it halves the image. `make` makes one
by its name. Batch normalisation comes without scale and shift (`affine=False`) while the
architecture is searched for: a scale could undo the edge's weight.

References:
    X. Dong, Y. Yang. NAS-Bench-201: Extending the scope of reproducible neural architecture
    search. ICLR 2020 (the five operations, and their ReLU-convolution-normalisation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from bilevel_flax.train.config import ConfigError, nearest
from examples.darts.convolutions import convolve, shifted


class Convolution(nn.Module):
    """A dense convolution without bias.

    Attributes:
        features: channels out.
        size: of the kernel.
        stride: between outputs.
        dilation: between taps.
        dtype: of the computation; None: the inputs'.
    """

    features: int
    size: int = 3
    stride: int = 1
    dilation: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [batch, height / stride, ..., features]."""
        shape = (self.size, self.size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        images, kernel = promote_dtype(images, kernel, dtype=self.dtype)
        return convolve(images, kernel, self.stride, self.dilation)


class Normalization(nn.Module):
    """Batch normalisation; with `train` by the statistics of the batch.

    Attributes:
        affine: with a learned scale and shift.
        momentum: of the running statistics.
        dtype: of the computation; None: the inputs'.
    """

    affine: bool = False
    momentum: float = 0.9
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at the operation's stride."""
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            use_scale=self.affine,
            use_bias=self.affine,
            dtype=self.dtype,
            name="norm",
        )(images)


class Zero(nn.Module):
    """The edge is not there."""

    stride: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at the operation's stride."""
        del train
        return jnp.zeros_like(images[:, :: self.stride, :: self.stride])


class Skip(nn.Module):
    """The identity."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at the operation's stride."""
        del train
        return images


class ReluConvolution(nn.Module):
    """ReLU, convolution, normalisation."""

    channels: int
    size: int
    stride: int = 1
    affine: bool = False
    momentum: float = 0.9
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at the operation's stride."""
        features = Convolution(self.channels, self.size, self.stride, dtype=self.dtype)(
            jax.nn.relu(images)
        )
        return Normalization(self.affine, self.momentum, self.dtype)(features, train)


class AveragePool(nn.Module):
    """The mean of the pixels within 3x3, those outside of the image left out."""

    stride: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at the operation's stride."""
        del train
        inside = jnp.ones((1, *images.shape[1:3], 1), images.dtype)
        total = lambda array: functools.reduce(jnp.add, shifted(array, 3, self.stride))
        return total(images) / total(inside)


# By the names of NAS-Bench-201: `(channels, stride, affine, momentum, dtype) -> module`.
Maker = Callable[[int, int, bool, float, Any], nn.Module]
NAS_BENCH_201: dict[str, Maker] = {
    "none": lambda c, stride, affine, momentum, dtype: Zero(stride),
    "skip_connect": lambda c, stride, affine, momentum, dtype: Skip(),
    "nor_conv_1x1": lambda c, stride, affine, momentum, dtype: ReluConvolution(
        c, 1, stride, affine, momentum, dtype
    ),
    "nor_conv_3x3": lambda c, stride, affine, momentum, dtype: ReluConvolution(
        c, 3, stride, affine, momentum, dtype
    ),
    "avg_pool_3x3": lambda c, stride, affine, momentum, dtype: AveragePool(stride),
}
OPERATIONS: dict[str, Maker] = dict(NAS_BENCH_201)


def check_names(names: Sequence[str], where: str) -> None:
    """Raises `ConfigError` unless all are operations; `where` names what asked for them."""
    for name in names:
        if name not in OPERATIONS:
            raise ConfigError(
                f"{where}: unknown operation {name!r}, choose among {', '.join(OPERATIONS)}"
                f"{nearest(name, list(OPERATIONS))}"
            )


def make(
    name: str,
    channels: int,
    stride: int = 1,
    affine: bool = False,
    momentum: float = 0.9,
    dtype: Any = None,
) -> nn.Module:
    """The operation called `name`.

    Args:
        name: one of `OPERATIONS`.
        channels: in and out.
        stride: 1 or 2; the identity takes 1 only.
        affine: normalisation with scale and shift.
        momentum: of the normalisation's running statistics.
        dtype: of the computation; None: the inputs'.

    Raises:
        ConfigError: an unknown name.
    """
    check_names([name], "operation")
    return OPERATIONS[name](channels, stride, affine, momentum, dtype)
