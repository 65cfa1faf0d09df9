"""DARTS's cell while it is searched for: all operations on all edges, weighted.

    node_j = Σ_{i < j} Σ_k w_ijk  op_k(state_i)

Eight operations on fourteen edges, each with its own weights, would be a thousand small kernels in
every cell, and minutes of compilation. So a program holds two mixed operations a cell, each on an
array with leading axes of states and edges: one for the eight edges out of the two inputs, and one
that a scan applies to the six between the nodes, two at a time. In it, ReLU and pooling (which have
no parameters) are there once a state, kernels of 3x3 are 5x5 with zeros around, and products and
normalisations are there once for all edges and kernels.

Normalisation is by the statistics of the minibatch, without scale and shift, in G and in F: a
scale could undo the edge's weight. So there is no running state.

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from examples.darts.depthwise import depthwise
from examples.darts.genotype import EDGES, INPUTS, NODES
from examples.darts.pooling import average_pool, max_pool

_EPSILON = 1e-5
_KEPT = "darts_kept"
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
# The order of the edges between nodes: both of a pair start at nodes that are complete by then.
PAIRS = (((2, 3), (2, 4)), ((3, 4), (2, 5)), ((3, 5), (4, 5)))

KINDS = {"plain": 1, "dilated": 2}  # dilations of the first stage

Kernels = Mapping[str, jax.Array]


def normalized(images: jax.Array, axes: tuple[int, ...] = (-4, -3, -2)) -> jax.Array:
    """Each channel by its mean and variance over [..., batch, height, width, channels]."""
    outputs, scale = _standardised(images, axes)
    del scale
    return outputs


# By hand, for the rule keeps the result and one number a channel, and is half as many operations.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardised(images: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The result, and 1 / standard deviation of each channel."""
    wide = _wide(images)
    centred = wide - wide.mean(axes, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + _EPSILON)
    return _kept((centred * scale).astype(images.dtype)), _kept(scale)


@_standardised.defjvp
def _standardised_jvp(axes, primals, tangents):
    outputs, scale = _standardised(primals[0], axes)
    wide, tangent = _wide(outputs), _wide(tangents[0])
    along = (wide * tangent).mean(axes, keepdims=True)
    moved = scale * (tangent - tangent.mean(axes, keepdims=True) - wide * along)
    return (outputs, scale), (moved.astype(outputs.dtype), -jnp.square(scale) * along)


def _wide(images: jax.Array) -> jax.Array:
    return images.astype(jnp.promote_types(images.dtype, jnp.float32))


def _kept(images: jax.Array) -> jax.Array:
    """Marks what the backward pass is handed; all else of a cell's body it makes again."""
    return checkpoint_name(images, _KEPT)


def rematerialised(body: Callable[..., Any]) -> Callable[..., Any]:
    """A scan's body of which only products and normalised images are kept for backpropagation.

    What lies between is cheap, and each array that a scan hands over costs memory, two kernels and
    their compilation, and as much again for its tangent.
    """
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def mixed(
    images: jax.Array,
    weights: jax.Array,
    kernels: Kernels,
    stride: int = 1,
    as_matrix: bool | None = None,
) -> jax.Array:
    """What the edges out of some states add to their nodes.

    Args:
        images: the states, [states, batch, height, width, channels].
        weights: [states, edges, operations].
        kernels: of these edges, leaves [states, edges, ...], see `edge_kernels`.
        stride: 2 for the inputs of a reduction cell.
        as_matrix: of depthwise convolutions, see `depthwise`.

    Returns:
        [states, edges, batch, height / stride, width / stride, channels].
    """
    channels, lead = images.shape[-1], weights.shape[:2]
    weights = weights.astype(images.dtype)
    # In the order of OPERATIONS.
    _, of_pools, of_skip, of_separable, of_dilated = jnp.split(weights, (1, 3, 4, 6), axis=-1)
    active = jax.nn.relu(images)
    pools = jnp.stack([pool(images, stride) for pool in POOLS.values()])
    size = pools.shape[2:-1]
    pools = _normalized(_pixels(pools, 2))
    total = jnp.einsum("sek,ksnc->senc", of_pools, pools)
    skip = _pixels(images, 1)[:, None] if stride == 1 else _halved(active, kernels["skip"])
    total += of_skip[..., None] * skip
    first = _first(active, kernels, stride, as_matrix)
    separable = jax.nn.relu(first[:, 0]).reshape(-1, *size, channels)
    separable = _second(separable, kernels, as_matrix).reshape(*lead, -1, *total.shape[2:])
    dilated = first[:, 1].reshape(separable.shape)
    for share, outputs in ((of_separable, separable), (of_dilated, dilated)):
        total += jnp.einsum("sek,seknc->senc", share, outputs)
    return total.reshape(*lead, *size, channels)


# Arrays of few axes: what XLA spends on a kernel grows with the number of its axes.


def _pixels(images: jax.Array, lead: int) -> jax.Array:
    """[..., batch, height, width, channels] -> [..., pixels of all of them, channels]."""
    return images.reshape(*images.shape[:lead], -1, images.shape[-1])


def _normalized(pixels: jax.Array) -> jax.Array:
    return normalized(pixels, (-2,))


def _pointwise(images: jax.Array, kernels: jax.Array) -> jax.Array:
    """[states, kernels, batch, height, width, channels] -> [states * kernels, pixels, channels]."""
    pixels = _pixels(images.reshape(-1, *images.shape[2:]), 1)
    return _normalized(pixels @ kernels.reshape(-1, *kernels.shape[-2:]))


def _first(active, kernels, stride: int, as_matrix) -> jax.Array:
    """The first of the separable, and the dilated ones: [states, 2, edges * 2, pixels, ...]."""
    states = len(active)
    of_state = [kernels[name].reshape(states, -1, *kernels[name].shape[3:]) for name in KINDS]
    outputs = _kept(depthwise(active, of_state, tuple(KINDS.values()), stride, as_matrix))
    outputs = _pointwise(outputs, kernels["first_pointwise"].swapaxes(1, 2))
    return outputs.reshape(states, len(KINDS), -1, *outputs.shape[1:])


def _second(images, kernels, as_matrix) -> jax.Array:
    """The second of the separable ones, without a stride, each on images of its own."""
    alone = kernels["second"].reshape(-1, 1, *kernels["second"].shape[3:])
    outputs = _kept(depthwise(images, [alone], (1,), 1, as_matrix))
    return _pointwise(outputs, kernels["second_pointwise"])


def _halved(active: jax.Array, kernels: jax.Array) -> jax.Array:
    """The identity at stride 2: two 1x1 convolutions, a pixel apart, side by side."""
    # Fused into the product, these slices make XLA's GPU compiler abort (jaxlib 0.11.2).
    pixels = jax.lax.optimization_barrier([_pixels(part, 1) for part in quarters(active)])
    parts = [
        jnp.einsum("snc,secf->senf", part, kernels[:, :, number])
        for number, part in enumerate(pixels)
    ]
    return _normalized(jnp.concatenate(parts, axis=-1))


def quarters(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every second pixel, and every second from the next row and column on (zero outside)."""
    around = [(0, 0)] * (images.ndim - 3) + [(0, 1), (0, 1), (0, 0)]
    shifted = jnp.pad(images[..., 1:, 1:, :], around)
    return images[..., ::2, ::2, :], shifted[..., ::2, ::2, :]


def edge_kernels(kernels: Kernels) -> dict[str, jax.Array]:
    """A cell's parameters as `mixed` takes them, the depthwise ones all of 5x5.

    Args:
        kernels: leaves [edges, ...], as `CellKernels` makes them.

    Returns:
        "plain" and "dilated" (of the first stage) and "second": [edges, 2, 5, 5, channels];
        "first_pointwise" [edges, 2 (plain, dilated), 2 (sizes), channels, channels];
        "second_pointwise" [edges, 2, channels, channels]; of a reduction cell "skip", too.
    """
    around = [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)]
    of_both = lambda stage: jnp.stack(
        [jnp.pad(kernels[f"{stage}_depthwise_3"], around), kernels[f"{stage}_depthwise_5"]], axis=2
    )
    plain, dilated = jnp.moveaxis(of_both("first"), 1, 0)
    pointwise = kernels["first_pointwise"]
    return {
        "plain": plain,
        "dilated": dilated,
        "second": of_both("second")[:, 0],
        "first_pointwise": pointwise.reshape(-1, 2, 2, *pointwise.shape[2:]),
        "second_pointwise": kernels["second_pointwise"],
        **{name: leaf for name, leaf in kernels.items() if name == "skip"},
    }


def search_cell(
    before: jax.Array,
    last: jax.Array,
    weights: jax.Array,
    kernels: Mapping[str, Any],
    stride: int = 1,
    as_matrix: bool | None = None,
) -> jax.Array:
    """All operations on all edges; the nodes side by side.

    Args:
        before: output of the last cell but one, as `compressible` gives it, [batch, height, width,
            any].
        last: of the last, of the same shape.
        weights: [14, 8], edges in the order BY_START, by OPERATIONS.
        kernels: "edges", see `edge_kernels`, and "compress", [2, any, channels].
        stride: 2: halves the images.
        as_matrix: of depthwise convolutions, see `depthwise`.

    Returns:
        [batch, height / stride, width / stride, 4 * channels].
    """
    active = jax.nn.relu(jnp.stack([before, last]))
    states = _normalized(_pixels(active, 1) @ kernels["compress"])
    states = states.reshape(*active.shape[:-1], -1)
    ends = NODES * INPUTS
    leaves = {"weights": weights, **kernels["edges"]}
    of_inputs = {
        name: leaf[:ends].reshape(INPUTS, NODES, *leaf.shape[1:]) for name, leaf in leaves.items()
    }
    nodes = mixed(states, of_inputs.pop("weights"), of_inputs, stride, as_matrix).sum(0)
    size = nodes.shape[1:]

    def add_pair(nodes, pair):
        at, leaves = pair
        starts, ends = at.astype(nodes.dtype)
        images = (starts @ nodes).reshape(INPUTS, *size)
        outputs = mixed(images, leaves.pop("weights"), leaves, 1, as_matrix)
        return nodes + ends.T @ outputs.reshape(INPUTS, -1), None

    leaves.pop("skip", None)
    order = [BY_START.index(EDGES.index(edge)) for pair in PAIRS for edge in pair]
    of_pairs = {name: _in_pairs(leaf, order) for name, leaf in leaves.items()}
    one_hot = np.eye(NODES, dtype=np.float32)[np.array(PAIRS) - INPUTS]  # [pairs, edge, end, node]
    flat = nodes.reshape(NODES, -1)
    flat, _ = jax.lax.scan(rematerialised(add_pair), flat, (one_hot.swapaxes(1, 2), of_pairs))
    nodes = flat.reshape(NODES, -1, size[-1]).swapaxes(0, 1)
    return nodes.reshape(*size[:-1], -1)


def _in_pairs(leaf: jax.Array, order: list[int]) -> jax.Array:
    """[edges, ...] -> [pairs, 2, 1, ...]; by slices, which XLA makes less of than of a gather."""
    chosen = jnp.concatenate([leaf[edge : edge + 1] for edge in order])
    return chosen.reshape(len(PAIRS), 2, 1, *leaf.shape[1:])


def compressible(images: jax.Array, halve: bool, channels: int) -> jax.Array:
    """A state as the 1x1 convolution that brings it into a cell takes it.

    Args:
        images: [batch, height, width, any].
        halve: whether they are twice as large as the cell's; two pixels become one then.
        channels: of the result, the last of them zeros.
    """
    images = jnp.concatenate(quarters(images), axis=-1) if halve else images
    return jnp.pad(images, [(0, 0)] * 3 + [(0, channels - images.shape[-1])])


class Compress(nn.Module):
    """Parameters of the 1x1 convolution that brings a state to a cell's channels.

    Attributes:
        channels: out.
        halve: whether the images are twice as large as the cell's: one convolution of a pixel, one
            of its neighbour, half of the channels each.
    """

    channels: int
    halve: bool = False

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        """[channels * (2 if halve else 1), self.channels], of states of so many channels."""
        count = 2 if self.halve else 1
        features = self.channels // count
        kernels = [
            self.param(f"kernel_{number}", scaled_normal, (channels, features))
            for number in range(count)
        ]
        return jax.scipy.linalg.block_diag(*kernels)


class CellKernels(nn.Module):
    """Parameters of a cell with all operations on all edges.

    Attributes:
        channels: of a node.
        reduce: halves the images.
        halved_before: the cell before it did.
    """

    channels: int
    reduce: bool = False
    halved_before: bool = False

    @nn.compact
    def __call__(self, before: int, last: int, padded: int) -> dict[str, Any]:
        """What `search_cell` takes.

        Args:
            before: channels of the last cell but one.
            last: of the last.
            padded: channels that `compressible` makes of either.
        """
        compress = [
            Compress(self.channels, self.halved_before, name="compress_0")(before),
            Compress(self.channels, name="compress_1")(last),
        ]
        rows = [jnp.pad(kernel, ((0, padded - len(kernel)), (0, 0))) for kernel in compress]
        return {"compress": jnp.stack(rows), "edges": edge_kernels(self._kernels())}

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
