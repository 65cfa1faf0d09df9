"""The networks of DARTS's space: a stem, a stack of cells, the mean over the pixels, a classifier.

`SearchNetwork` mixes all operations and is what a search trains; `DerivedNetwork` is that of one
genotype, trained from scratch. Both double their channels in the reduction cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel_flax.train.config import ConfigError
from examples.darts.cells import (
    BY_START,
    CellKernels,
    compressible,
    fan_in,
    normalized,
    rematerialised,
    search_cell,
)
from examples.darts.genotype import CELLS, EDGES, NODES, OPERATIONS
from examples.darts.operations import Convolution

STEM = 3  # times the width: channels of the stem
_LEAST = 2  # pixels a side in the last cell: of one there is nothing to pool


class Stack(NamedTuple):
    """What kind of cells, one above the other.

    Attributes:
        width: channels of a node in the first cell (twice as many if it is a reduction).
        reductions: for each cell, whether it halves the images.
        stem_stride: 1, or 2 or 4 to halve the images once or twice before the first cell.
    """

    width: int
    reductions: tuple[bool, ...]
    stem_stride: int = 1

    @property
    def channels(self) -> tuple[int, ...]:
        """Of a node, for each cell."""
        counts, now = [], self.width
        for reduce in self.reductions:
            now *= 2 if reduce else 1
            counts.append(now)
        return tuple(counts)


def make_stack(
    image_size: int,
    width: int,
    cells: int,
    reductions: Sequence[int] | None = None,
    stem_stride: int = 1,
    where: str = "config.network",
) -> Stack:
    """The stack that a config describes, checked.

    Args:
        image_size: pixels a side.
        width: channels of a node in the first cell, even.
        cells: in all.
        reductions: which cells halve the images; None: DARTS's, at a third and two thirds.
        stem_stride: 1, 2 or 4.
        where: what errors call the origin.

    Raises:
        ConfigError: images that the reductions leave nothing of, a number out of range.
    """
    if reductions is None:
        reductions = sorted({cells // 3, 2 * cells // 3})
    for name, value, fine in (
        ("width", width, width >= 2 and width % 2 == 0),
        ("cells", cells, cells >= 1),
        ("reductions", tuple(reductions), all(0 <= cell < cells for cell in reductions)),
        ("stem_stride", stem_stride, stem_stride in (1, 2, 4)),
    ):
        if not fine:
            needs = {
                "width": "must be even and 2 or more",
                "cells": "must be 1 or more",
                "reductions": f"must be cells, from 0 to {cells - 1}",
                "stem_stride": "must be 1, 2 or 4",
            }[name]
            raise ConfigError(f"{where}.{name}={value}: {needs}")
    halvings = len(set(reductions)) + stem_stride // 2
    least = (_LEAST - 1) * 2**halvings + 1
    if image_size < least:
        raise ConfigError(
            f"images of {image_size}x{image_size} are too small for {len(set(reductions))} "
            f"reductions and a stem of stride {stem_stride}: take {least}x{least} or larger, or "
            f"fewer {where}.reductions"
        )
    return Stack(width, tuple(cell in set(reductions) for cell in range(cells)), stem_stride)


class Stem(nn.Module):
    """Convolutions 3x3 of stride 1 or 2, normalised by the minibatch.

    Attributes:
        stack: says how large its output is.
    """

    stack: Stack

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, any] -> [batch, height / stem_stride, ..., 3 * width]."""
        channels, stride = STEM * self.stack.width, self.stack.stem_stride
        for number in range(stride // 4):
            images = Convolution(channels // 2, stride=2, name=f"before_{number}")(images)
            images = jax.nn.relu(normalized(images))
        return normalized(Convolution(channels, stride=min(stride, 2), name="conv")(images))


class SearchNetwork(nn.Module):
    """All operations on all edges of all cells.

    Attributes:
        stack: the cells.
        num_classes: logits.
        as_matrix: of depthwise convolutions, see `depthwise`.
    """

    stack: Stack
    num_classes: int = 10
    as_matrix: bool | None = None

    @nn.compact
    def __call__(self, images: jax.Array, weights: Mapping[str, Any]) -> jax.Array:
        """Logits float32 [batch, num_classes].

        Args:
            images: [batch, height, width, channels].
            weights: "normal" and "reduce": [14, 8], shares of the operations.
        """
        last = before = Stem(self.stack, name="stem")(images)
        ordered = {name: rows[jnp.array(BY_START)] for name, rows in weights.items()}
        for cells in _runs(self.stack.reductions):
            before, last = self._run(cells, before, last, ordered)
        logits = nn.Dense(self.num_classes, name="classifier")(last.mean((1, 2)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def _run(
        self, cells: range, before: jax.Array, last: jax.Array, weights: Mapping[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        """Outputs of the last two after cells that are alike: one body in the program."""
        reduce, channels = self.stack.reductions[cells[0]], self.stack.channels[cells[0]]
        halved = cells[0] > 0 and self.stack.reductions[cells[0] - 1]
        counts = [before.shape[-1], last.shape[-1]]
        # A run's first cell may see other channels than its own kind gives.
        padded = max(
            counts[0] * (2 if halved else 1), counts[1], NODES * channels * (len(cells) > 1)
        )
        kernels = []
        for number in cells:
            first = halved and number == cells[0]
            cell = CellKernels(channels, reduce, first, name=f"cell_{number}")
            kernels.append(cell(counts[0], counts[1], padded))
            counts = [counts[1], NODES * channels]
        shares, stride = weights["reduce" if reduce else "normal"], 2 if reduce else 1

        def step(states, kernels):
            before, last = states
            after = search_cell(before, last, shares, kernels, stride, self.as_matrix)
            return (last, after), None

        states = compressible(before, halved, padded), compressible(last, False, padded)
        if len(cells) == 1:
            return last, step(states, kernels[0])[0][1]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kernels)
        return jax.lax.scan(rematerialised(step), states, stacked)[0]


def _runs(reductions: Sequence[bool]) -> list[range]:
    """The cells, those that have the same shapes together: normal ones between two reductions."""
    starts = [i for i, reduce in enumerate(reductions) if i == 0 or reduce or reductions[i - 1]]
    return [range(*ends) for ends in itertools.pairwise([*starts, len(reductions)])]


def search_parameters(
    network: SearchNetwork, rng: jax.Array, image_shape: Sequence[int]
) -> dict[str, Any]:
    """Initial parameters of a search network, as `initial` draws them.

    Args:
        network: the network.
        rng: key.
        image_shape: [height, width, channels].
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shares = jax.ShapeDtypeStruct((len(EDGES), len(OPERATIONS)), jnp.float32)
    shapes = jax.eval_shape(network.init, rng, images, dict.fromkeys(CELLS, shares))
    return initial(shapes["params"], rng)


def initial(shapes: Any, rng: jax.Array) -> Any:
    """A network's first variables: normal with variance 1 / fan_in, scales 1, biases 0.

    As one draw that is cut up. `network.init` draws leaf by leaf, and compiling all these
    generators takes XLA's CPU backend minutes.

    Args:
        shapes: of the variables.
        rng: key.
    """
    leaves, tree = jax.tree.flatten_with_path(shapes)
    drawn = jax.random.normal(rng, (sum(leaf.size for _, leaf in leaves),))
    parts, start = [], 0
    for path, leaf in leaves:
        part = drawn[start : start + leaf.size].reshape(leaf.shape)
        start += leaf.size
        name = path[-1].key
        if name in ("scale", "var"):
            part = jnp.ones_like(part)
        elif name in ("bias", "mean"):
            part = jnp.zeros_like(part)
        else:
            part = part / fan_in(leaf.shape) ** 0.5
        parts.append(part)
    return jax.tree.unflatten(tree, parts)
