"""The network of one genotype, trained from scratch: affine BatchNorm, drop-path, auxiliary head.

Operations differ from those of the search as in the paper: normalisation has a scale, a shift and
running statistics, and pooling has none.

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
    G. Larsson, M. Maire, G. Shakhnarovich. FractalNet: Ultra-deep neural networks without
    residuals. ICLR 2017 (drop-path).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from examples.darts.cells import CONVOLUTIONS, POOLS, SEPARABLE, quarters, scaled_normal
from examples.darts.depthwise import depthwise
from examples.darts.genotype import INPUTS, Cell, Genotype
from examples.darts.network import STEM, Stack
from examples.darts.operations import Convolution

_MOMENTUM = 0.9
_AUXILIARY_CHANNELS = 64


class Norm(nn.Module):
    """BatchNorm with scale and shift; in training by the minibatch."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same."""
        return nn.BatchNorm(use_running_average=not train, momentum=_MOMENTUM, name="norm")(images)


class Pointwise(nn.Module):
    """ReLU and a 1x1 convolution, halving the images on request; normalised.

    Attributes:
        channels: out.
        halve: by two convolutions a pixel apart.
    """

    channels: int
    halve: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, any] -> [batch, height (/ 2), width (/ 2), channels]."""
        active = jax.nn.relu(images)
        parts = quarters(active) if self.halve else (active,)
        features = self.channels // len(parts)
        outputs = [
            part @ self.param(f"kernel_{number}", scaled_normal, (part.shape[-1], features))
            for number, part in enumerate(parts)
        ]
        return Norm()(jnp.concatenate(outputs, axis=-1), train)


class DepthwiseConvolution(nn.Module):
    """ReLU, depthwise and pointwise convolution, normalised; separable ones twice.

    Attributes:
        name_of: one of `CONVOLUTIONS`.
        stride: of the first.
    """

    name_of: str
    stride: int = 1
    as_matrix: bool | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[batch, height, width, channels] -> the same, at the operation's stride."""
        size, dilation = CONVOLUTIONS[self.name_of]
        channels = images.shape[-1]
        for stage in range(2 if self.name_of in SEPARABLE else 1):
            shape = (1, 1, size, size, channels)
            kernel = self.param(f"depthwise_{stage}", scaled_normal, shape)
            stride = self.stride if stage == 0 else 1
            active = jax.nn.relu(images)
            filtered = depthwise(active[None], [kernel], [dilation], stride, self.as_matrix)[0, 0]
            matrix = self.param(f"pointwise_{stage}", scaled_normal, (channels, channels))
            images = Norm()(filtered @ matrix, train)
        return images


class DerivedCell(nn.Module):
    """A cell of a genotype.

    Attributes:
        cell: its nodes.
        channels: of a node.
        reduce: halves the images.
        halved_before: the cell before it did.
        as_matrix: of depthwise convolutions, see `depthwise`.
    """

    cell: Cell
    channels: int
    reduce: bool = False
    halved_before: bool = False
    as_matrix: bool | None = None

    @nn.compact
    def __call__(
        self, before: jax.Array, last: jax.Array, drop_path: Any, *, train: bool
    ) -> jax.Array:
        """The nodes side by side, [batch, height, width, 4 * channels].

        Args:
            before: output of the last cell but one.
            last: of the last.
            drop_path: probability of leaving out an edge (but skips) for an example in training.
            train: training mode; draws from the rng "dropout" where drop_path is not 0 (Python).
        """
        states = [
            Pointwise(self.channels, self.halved_before, name="compress_0")(before, train),
            Pointwise(self.channels, name="compress_1")(last, train),
        ]
        for number, edges in enumerate(self.cell):
            total: Any = 0.0
            for place, (operation, start) in enumerate(edges):
                stride = 2 if self.reduce and start < INPUTS else 1
                name = f"node_{number}_edge_{place}"
                image = self._operation(operation, stride, name, states[start], train)
                is_skip = operation == "skip_connect" and stride == 1
                if train and not is_skip and not _is_zero(drop_path):
                    image = dropped(self.make_rng("dropout"), image, drop_path)
                total = total + image
            states.append(total)
        return jnp.concatenate(states[INPUTS:], axis=-1)

    def _operation(self, operation: str, stride: int, name: str, images, train: bool):
        if operation == "none":
            return jnp.zeros_like(images[:, ::stride, ::stride])
        if operation in POOLS:
            return POOLS[operation](images, stride)
        if operation == "skip_connect":
            if stride == 1:
                return images
            return Pointwise(self.channels, halve=True, name=name)(images, train)
        return DepthwiseConvolution(operation, stride, self.as_matrix, name=name)(images, train)


def _is_zero(probability: Any) -> bool:
    return isinstance(probability, float | int) and probability == 0


def dropped(rng: jax.Array, images: jax.Array, probability: Any) -> jax.Array:
    """Each example as a whole: 0 with this probability, else divided by what is left of 1."""
    survives = jax.random.bernoulli(rng, 1 - probability, (len(images), 1, 1, 1))
    return jnp.where(survives, images / jnp.maximum(1 - probability, 1e-6), 0).astype(images.dtype)


class DerivedNetwork(nn.Module):
    """A stem, the genotype's cells, the mean over the pixels, a classifier.

    Attributes:
        genotype: the two cells.
        stack: how they are stacked.
        num_classes: logits.
        auxiliary: with a second classifier after two thirds of the cells, for training.
        as_matrix: of depthwise convolutions, see `depthwise`.
    """

    genotype: Genotype
    stack: Stack
    num_classes: int = 10
    auxiliary: bool = False
    as_matrix: bool | None = None

    @nn.compact
    def __call__(
        self, images: jax.Array, drop_path: Any = 0.0, *, train: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """(logits, the auxiliary head's or None), float32 [batch, num_classes].

        Args:
            images: [batch, height, width, channels].
            drop_path: see `DerivedCell`.
            train: training mode.
        """
        last = images
        channels, stride = STEM * self.stack.width, self.stack.stem_stride
        for number in range(stride // 4):
            last = Convolution(channels // 2, stride=2, name=f"stem_before_{number}")(last)
            last = jax.nn.relu(Norm(name=f"stem_norm_{number}")(last, train))
        last = Convolution(channels, stride=min(stride, 2), name="stem")(last)
        before = last = Norm(name="stem_norm")(last, train)
        halved, extra = False, None
        for number, (reduce, width) in enumerate(
            zip(self.stack.reductions, self.stack.channels, strict=True)
        ):
            cell = DerivedCell(
                self.genotype.reduce if reduce else self.genotype.normal,
                width,
                reduce,
                halved,
                self.as_matrix,
                name=f"cell_{number}",
            )
            before, last = last, cell(before, last, drop_path, train=train)
            halved = reduce
            if self.auxiliary and number == 2 * len(self.stack.reductions) // 3:
                extra = self._auxiliary_head(last, train)
        return self._classified(last, "classifier"), extra

    def _auxiliary_head(self, images: jax.Array, train: bool) -> jax.Array:
        features = Pointwise(_AUXILIARY_CHANNELS, name="auxiliary")(images, train)
        return self._classified(jax.nn.relu(features), "auxiliary_classifier")

    def _classified(self, images: jax.Array, name: str) -> jax.Array:
        logits = nn.Dense(self.num_classes, name=name)(images.mean((1, 2)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
