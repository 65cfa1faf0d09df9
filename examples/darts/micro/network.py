"""The networks of the micro-space: one Flax module for the supernet and for each of the 625."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from examples.darts import operations
from examples.darts.micro.space import EDGES, NODES, OPERATIONS


class Edge(nn.Module):
    """The operations of one edge: their mixture, or one of them.

    Attributes:
        names: of the operations.
        channels: in and out.
        momentum: of the normalisation's running statistics.
        dtype: of the computation; None: the inputs'.
    """

    names: tuple[str, ...]
    channels: int
    momentum: float = 0.9
    dtype: Any = None

    def setup(self):
        """One module for each operation."""
        self.operations = [
            operations.make(name, self.channels, momentum=self.momentum, dtype=self.dtype)
            for name in self.names
        ]

    def __call__(self, images: jax.Array, choice: jax.Array, train: bool) -> jax.Array:
        """All operations weighted by `choice` [names], or where it is an int32 [] that one."""
        if choice.ndim == 0:
            return self._one(images, choice, train)
        total = jnp.zeros_like(images)
        for weight, name, operation in zip(choice, self.names, self.operations, strict=True):
            if name != "none":  # zero, whatever its weight
                total += weight.astype(images.dtype) * operation(images, train)
        return total

    def _one(self, images: jax.Array, choice: jax.Array, train: bool) -> jax.Array:
        def branch(number: int):
            return lambda module, images: module.operations[number](images, train)

        branches = [branch(number) for number in range(len(self.names))]
        if self.is_initializing():  # each makes its parameters
            for one in branches:
                one(self, images)
        return nn.switch(choice, branches, self, images)


class MicroNetwork(nn.Module):
    """A strided stem, one cell, normalisation, the mean over the pixels, a linear classifier.

    Normalisation has no scale and no shift, in the supernet and in the networks alike. The tree of
    parameters is the same for all; those of operations that were not chosen are not used.

    Attributes:
        names: the operations that an edge chooses from.
        channels: of the cell.
        num_classes: logits.
        momentum: of the normalisation's running statistics.
        dtype: of the computation; None: the inputs'.
    """

    names: tuple[str, ...] = OPERATIONS
    channels: int = 8
    num_classes: int = 10
    momentum: float = 0.9
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: jax.Array, choices: jax.Array | Sequence[jax.Array], *, train: bool
    ) -> jax.Array:
        """Logits [batch, num_classes].

        Args:
            images: [batch, height, width, 1].
            choices: of each edge: weights [4, names] for the supernet, or numbers int32 [4] for one
                network; a compiled program serves all 625.
            train: normalise by the statistics of the batch.
        """
        normalized = lambda features: operations.Normalization(
            momentum=self.momentum, dtype=self.dtype
        )(features, train)
        stem = operations.Convolution(self.channels, stride=2, dtype=self.dtype)(images)
        nodes: list[Any] = [normalized(stem)] + [0.0] * (NODES - 1)
        for edge, (start, end) in enumerate(EDGES):
            operation = Edge(
                self.names, self.channels, self.momentum, self.dtype, name=f"edge_{edge}"
            )
            nodes[end] = nodes[end] + operation(nodes[start], choices[edge], train)
        features = jax.nn.relu(normalized(nodes[-1]))
        return nn.Dense(self.num_classes, dtype=self.dtype)(features.mean((1, 2)))
