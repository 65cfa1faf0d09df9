"""The space: four nodes, an edge between any two, a skip or a 3x3 convolution on each; few digits.

It is S2 of Zela et al. in small. A skip costs nothing to learn, so the supernet leans on it while
the kernels overfit the few digits of G; trained from scratch the networks of convolutions are the
better ones.

References:
    A. Zela, T. Elsken, T. Saikia, Y. Marrakchi, T. Brox, F. Hutter. Understanding and robustifying
    differentiable architecture search. ICLR 2020.
"""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.outer import architecture
from examples.darts.cells import normalized
from examples.darts.depthwise import taps
from examples.darts.micro import data as micro_data

NODES = 4
# Those out of one node are neighbours.
EDGES = tuple(itertools.combinations(range(NODES), 2))
SKIP, CONVOLUTION = OPERATIONS = ("skip_connect", "nor_conv_3x3")
MIXTURE = architecture.mixture({"cell": len(EDGES)}, OPERATIONS)
WEIGHT_DECAY = 1e-3
Genotype = tuple[str, ...]


def genotypes() -> list[Genotype]:
    """All 64: an operation for each of EDGES."""
    return list(itertools.product(OPERATIONS, repeat=len(EDGES)))


def one_hot(genotype: Genotype) -> np.ndarray:
    """The mixture float32 [6, 2] that is one network."""
    return np.eye(len(OPERATIONS), dtype=np.float32)[[OPERATIONS.index(name) for name in genotype]]


def collapsed(genotype: Genotype) -> bool:
    """Whether at least half of the edges are skips."""
    return 2 * genotype.count(SKIP) >= len(EDGES)


def digits(images: np.ndarray, by: np.ndarray) -> np.ndarray:
    """[n, 14, 14, 1] as [n, 7, 7, 1], means of 2x2 pixels; in units of `by`, made as small."""
    halved = lambda array: array.reshape(-1, 7, 2, 7, 2, 1).mean((2, 4))
    known = halved(by)
    return (halved(images) - known.mean()) / known.std()


def training_digits() -> micro_data.Digits:
    """The 5,000 of mnist5k, of which a search or a training takes a few."""
    every = micro_data.all_digits()
    return micro_data.Digits(digits(every.image, every.image), every.label)


def convolved(images: jax.Array, kernels: jax.Array, stride: int = 1) -> jax.Array:
    """Several dense convolutions of the same images.

    A product with one matrix from all pixels to all pixels: of 4x4 pixels, 8 channels and 64
    images three times as fast on a CPU as the sum over shifted images.

    Args:
        images: [batch, height, width, channels].
        kernels: [count, 3, 3, channels, features]; zeros stand around the images.
        stride: between outputs.

    Returns:
        [batch, count, ceil(height / stride), ceil(width / stride), features].
    """
    batch, height, width, _ = images.shape
    rows, columns = (taps(kernels.shape[1], length, stride) for length in (height, width))
    matrix = jnp.einsum("kijcf,iph,jqw->hwckpqf", kernels, rows, columns)
    flat = images.reshape(batch, -1) @ matrix.reshape(images[0].size, -1)
    return flat.reshape(batch, *matrix.shape[3:])


class Network(nn.Module):
    """A strided stem, the cell, the mean over the pixels, a linear classifier.

    Normalisation is by the images at hand, without scale and shift, everywhere.

    Attributes:
        channels: of the cell.
        num_classes: logits.
    """

    channels: int = 8
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, weights: jax.Array) -> jax.Array:
        """Logits [batch, num_classes].

        Args:
            images: [batch, height, width, 1].
            weights: [6, 2], what each operation of an edge counts for: shares for the supernet,
                `one_hot` for one network.
        """
        start = nn.initializers.he_normal(batch_axis=0)
        stem = self.param("stem", start, (1, 3, 3, images.shape[-1], self.channels))
        kernels = self.param("edges", start, (len(EDGES), 3, 3, self.channels, self.channels))
        nodes: list[Any] = [normalized(convolved(images, stem, 2)[:, 0], (0, 1, 2))]
        nodes += [0.0] * (NODES - 1)
        for node in range(NODES - 1):
            edges = [edge for edge, (begin, _) in enumerate(EDGES) if begin == node]
            outputs = convolved(jax.nn.relu(nodes[node]), kernels[edges[0] : edges[-1] + 1])
            outputs = normalized(outputs, (0, 2, 3))
            for place, edge in enumerate(edges):
                total = weights[edge, 0] * nodes[node] + weights[edge, 1] * outputs[:, place]
                nodes[EDGES[edge][1]] += total
        features = jax.nn.relu(normalized(nodes[-1], (0, 1, 2)))
        return nn.Dense(self.num_classes)(features.mean((1, 2)))


def cross_entropy(z: Any, weights: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean over a batch {"image", "label"}."""
    logits = jnp.asarray(Network().apply({"params": z}, batch["image"], weights))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return each.mean()


def training_loss(
    z: Any, weights: jax.Array, batch: dict[str, jax.Array], decay: float = WEIGHT_DECAY
) -> jax.Array:
    """The cross-entropy and ½ decay ‖z‖²."""
    squares = jax.tree.map(lambda leaf: jnp.sum(leaf**2), z)
    return cross_entropy(z, weights, batch) + 0.5 * decay * optax.tree.sum(squares)


def init(rng: jax.Array) -> Any:
    """Parameters, of the supernet and of each network alike."""
    return Network().init(rng, jnp.zeros((2, 7, 7, 1)), one_hot((SKIP,) * len(EDGES)))["params"]
