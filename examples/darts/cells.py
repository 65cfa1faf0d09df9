"""DARTS's cell while it is searched for: all operations on all edges, weighted.

    node_j = Σ_{i < j} Σ_k w_ijk  op_k(state_i)

Eight operations on fourteen edges, each with its own weights, would be a thousand small kernels in
every cell. But all edges out of one state see the same images, so they are evaluated together, in
one array with a leading axis of edges: ReLU and pooling (which have no parameters) once a state,
the convolutions' products and normalisations once for all edges and kernels.

Normalisation is by the statistics of the minibatch, without scale and shift, in G and in F: a
scale could undo the edge's weight. So there is no running state.

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from examples.darts.depthwise import depthwise
from examples.darts.genotype import EDGES, INPUTS, NODES, OPERATIONS
from examples.darts.pooling import average_pool, max_pool

_EPSILON = 1e-5
POOLS = {"max_pool_3x3": max_pool, "avg_pool_3x3": average_pool}
# (size, dilation); the separable ones are applied twice.
CONVOLUTIONS = {
    "sep_conv_3x3": (3, 1),
    "sep_conv_5x5": (5, 1),
    "dil_conv_3x3": (3, 2),
    "dil_conv_5x5": (5, 2),
}
SEPARABLE, DILATED = list(CONVOLUTIONS)[:2], list(CONVOLUTIONS)[2:]
# Parameters have their edges in this order: those out of one state are neighbours.
BY_START = sorted(range(len(EDGES)), key=lambda edge: EDGES[edge])


def normalized(images: jax.Array) -> jax.Array:
    """Each channel by its mean and variance over [..., batch, height, width, channels]."""
    wide = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    axes = (-4, -3, -2)
    centred = wide - wide.mean(axes, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + _EPSILON)
    return (centred * scale).astype(images.dtype)


def mixed(
    images: jax.Array,
    weights: jax.Array,
    kernels: Mapping[str, jax.Array],
    stride: int = 1,
    as_matrix: bool | None = None,
) -> jax.Array:
    """What the edges out of one state add to their nodes.

    Args:
        images: the state, [batch, height, width, channels].
        weights: [edges, operations].
        kernels: of these edges, see `SearchCell`.
        stride: 2 for the inputs of a reduction cell.
        as_matrix: of depthwise convolutions, see `depthwise`.

    Returns:
        [edges, batch, height / stride, width / stride, channels].
    """
    weights = weights.astype(images.dtype)
    of = lambda *names: weights[:, jnp.array([OPERATIONS.index(name) for name in names])]
    active = jax.nn.relu(images)
    pools = normalized(jnp.stack([pool(images, stride) for pool in POOLS.values()]))
    total = jnp.einsum("ek,knhwc->enhwc", of(*POOLS), pools)
    skipped = images[None] if stride == 1 else _halved(active, kernels["skip"])
    total += of("skip_connect")[..., None, None, None] * skipped
    first = _stage(active, kernels, "first", list(CONVOLUTIONS), stride, as_matrix)
    again = jax.nn.relu(first[:, : len(SEPARABLE)])
    # The second of a separable convolution has no stride.
    twice = _stage(again, kernels, "second", SEPARABLE, 1, as_matrix)
    outputs = jnp.concatenate([twice, first[:, len(SEPARABLE) :]], axis=1)
    return total + jnp.einsum("ek,eknhwc->enhwc", of(*CONVOLUTIONS), outputs)


def _stage(images, kernels, stage: str, names, stride: int, as_matrix) -> jax.Array:
    """Depthwise, pointwise, normalised: [edges, names, batch, height, width, channels]."""
    sizes = [CONVOLUTIONS[name][0] for name in names]
    dilations = [CONVOLUTIONS[name][1] for name in names]
    chosen = [
        kernels[f"{stage}_depthwise_{size}"][:, sizes[:number].count(size)]
        for number, size in enumerate(sizes)
    ]
    outputs = depthwise(images, chosen, dilations, stride, as_matrix)
    return normalized(jnp.einsum("eknhwc,ekcd->eknhwd", outputs, kernels[f"{stage}_pointwise"]))


def _halved(active: jax.Array, kernels: jax.Array) -> jax.Array:
    """The identity at stride 2: two 1x1 convolutions, a pixel apart, side by side."""
    parts = [
        jnp.einsum("nhwc,ecd->enhwd", part, kernels[:, number])
        for number, part in enumerate(quarters(active))
    ]
    return normalized(jnp.concatenate(parts, axis=-1))


def quarters(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every second pixel, and every second from the next row and column on (zero outside)."""
    shifted = jnp.pad(images[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
    return images[:, ::2, ::2], shifted[:, ::2, ::2]


class Compress(nn.Module):
    """A state brought to the cell's channels, and to its size where the cell before it halved.

    Attributes:
        channels: out.
        halve: whether the images are twice as large as the cell's.
    """

    channels: int
    halve: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, any] -> [batch, height (/ 2), width (/ 2), channels]."""
        active = jax.nn.relu(images)
        parts = quarters(active) if self.halve else (active,)
        features = self.channels // len(parts)
        outputs = [
            part @ self.param(f"kernel_{number}", scaled_normal, (part.shape[-1], features))
            for number, part in enumerate(parts)
        ]
        return normalized(jnp.concatenate(outputs, axis=-1))


class SearchCell(nn.Module):
    """A cell with all operations on all edges.

    Attributes:
        channels: of a node.
        reduce: halves the images.
        halved_before: the cell before it did.
        as_matrix: of depthwise convolutions, see `depthwise`.
    """

    channels: int
    reduce: bool = False
    halved_before: bool = False
    as_matrix: bool | None = None

    @nn.compact
    def __call__(self, before: jax.Array, last: jax.Array, weights: jax.Array) -> jax.Array:
        """The nodes side by side.

        Args:
            before: output of the last cell but one.
            last: of the last.
            weights: [14, 8], EDGES by OPERATIONS.

        Returns:
            [batch, height, width, 4 * channels].
        """
        states = [
            Compress(self.channels, self.halved_before, name="compress_0")(before),
            Compress(self.channels, name="compress_1")(last),
        ]
        kernels = self._kernels()
        weights = weights[jnp.array(BY_START)]
        sums: list[Any] = [0.0] * NODES
        for start in range(INPUTS + NODES - 1):
            ends = [EDGES[edge][1] - INPUTS for edge in BY_START if EDGES[edge][0] == start]
            at = [EDGES[edge][0] for edge in BY_START].index(start)
            here = slice(at, at + len(ends))
            outputs = mixed(
                states[start],
                weights[here],
                {name: leaf[here] for name, leaf in kernels.items()},
                2 if self.reduce and start < INPUTS else 1,
                self.as_matrix,
            )
            for node, images in zip(ends, outputs, strict=True):
                sums[node] = sums[node] + images
            if start >= INPUTS - 1:  # all edges into the next node are there
                states.append(sums[start - INPUTS + 1])
        return jnp.concatenate(states[INPUTS:], axis=-1)

    def _kernels(self) -> dict[str, jax.Array]:
        """One leaf for all edges: an optimiser's few kernels for each leaf add up."""
        edges, channels = len(EDGES), self.channels
        shapes = {}
        for stage, count in (("first", 2), ("second", 1)):  # the dilated ones have no second
            shapes[f"{stage}_depthwise_3"] = (edges, count, 3, 3, channels)
            shapes[f"{stage}_depthwise_5"] = (edges, count, 5, 5, channels)
            shapes[f"{stage}_pointwise"] = (edges, 2 * count, channels, channels)
        if self.reduce:  # of the edges out of the two inputs, which come first
            inputs = sum(EDGES[edge][0] < INPUTS for edge in BY_START)
            shapes["skip"] = (inputs, 2, channels, channels // 2)
        return {name: self.param(name, scaled_normal, shape) for name, shape in shapes.items()}


def fan_in(shape: tuple[int, ...]) -> int:
    """Products that an output sums up, by the shape of the parameters (a bias has 1)."""
    if len(shape) == 5:  # depthwise, [edges, kernels, size, size, channels]
        return shape[2] * shape[3]
    if len(shape) == 4 and shape[0] == shape[1]:  # dense, [size, size, channels, features]
        return shape[0] * shape[1] * shape[2]
    return shape[-2] if len(shape) > 1 else 1


def scaled_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal with variance 1 / fan_in; normalisation follows every product."""
    return jax.random.normal(key, shape, dtype) / fan_in(shape) ** 0.5
