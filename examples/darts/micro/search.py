"""The search in the micro-space: supernet, losses, and what becomes of the learned weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.data import split
from bilevel_flax.outer import architecture
from examples.darts.micro import data as micro_data
from examples.darts.micro.network import MicroNetwork
from examples.darts.micro.space import EDGES, OPERATIONS, Genotype

CELL = "cell"
BATCH_SIZE = 64
WEIGHT_DECAY = 1e-3


class Search(NamedTuple):
    """A search's problem and data.

    Attributes:
        problem: G on one half of the digits, F on the other.
        inner: the digits of G.
        outer: the digits of F.
        init: `init(rng) -> (z, x)`.
        accuracy: `accuracy(z, weights [4, names]) -> float` of the supernet on all digits of F.
        names: of the operations.
    """

    problem: bf.Problem
    inner: data.FiniteSum
    outer: data.FiniteSum
    init: Callable[[jax.Array], tuple[Any, Any]]
    accuracy: Callable[[Any, Any], float]
    names: tuple[str, ...] = OPERATIONS


def mixture(names: tuple[str, ...]) -> architecture.Architecture:
    """The mixtures of the cell's four edges."""
    return architecture.mixture({CELL: len(EDGES)}, names)


def make_problem(network: MicroNetwork) -> bf.Problem:
    """G and F, both with the statistics of the minibatch, so that nothing is to be carried along.

    G = mean CE + ½ c ‖z‖² on one half of the digits, F = mean CE on the other.
    """
    weights_of = mixture(network.names).weights

    def cross_entropy(z, x, batch):
        logits, _ = network.apply(
            {"params": z},
            batch["image"],
            weights_of(x)[CELL],
            train=True,
            mutable=["batch_stats"],
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return bf.masked_mean(each, batch.get("mask"))

    def inner_loss(z, x, batch):
        squares = jax.tree.map(lambda leaf: jnp.sum(leaf**2), z)
        return cross_entropy(z, x, batch) + 0.5 * WEIGHT_DECAY * optax.tree.sum(squares)

    return bf.Problem(inner_loss, cross_entropy)


def make_search(
    seed: int,
    digits: micro_data.Digits | None = None,
    network: MicroNetwork | None = None,
    batch_size: int = BATCH_SIZE,
) -> Search:
    """The search with `seed`, which draws the two halves.

    Args:
        seed: non-negative.
        digits: standardised; None: mnist5k.
        network: the supernet; None: as the table's networks.
        batch_size: of both sides.

    Raises:
        ValueError: fewer digits than two minibatches.
    """
    if digits is None:
        every = micro_data.all_digits()
        digits = micro_data.standardized(every, every)
    network = network or MicroNetwork()
    cells = mixture(network.names)
    # Whole minibatches: normalisation by a minibatch's statistics is at odds with padding.
    half = len(digits.label) // 2 // batch_size * batch_size
    if not half:
        raise ValueError(
            f"batch_size={batch_size}: {len(digits.label)} digits are no minibatch for each side"
        )
    parts = split.stratified(digits.label, {"inner": half, "outer": half}, seed=seed)
    inner, outer = (
        data.partition(
            {"image": digits.image[rows], "label": digits.label[rows]}, batch_size, seed=seed
        )
        for rows in parts.values()
    )
    images, labels = digits.image[parts["outer"]], digits.label[parts["outer"]]

    def init(rng: jax.Array):
        of_z, of_x = jax.random.split(rng)
        x = cells.init(of_x)
        variables = network.init(of_z, images[:2], cells.weights(x)[CELL], train=True)
        return variables["params"], x

    def accuracy(z, weights) -> float:
        predicted = _predictions(network, z, jnp.asarray(weights), images)
        return float(np.mean(np.asarray(predicted) == labels))

    return Search(make_problem(network), inner, outer, init, accuracy, network.names)


# The digits are an argument: every seed has others, and one program serves them all.
@functools.partial(jax.jit, static_argnums=0)
def _predictions(network: MicroNetwork, z, weights: jax.Array, images: jax.Array) -> jax.Array:
    logits, _ = network.apply({"params": z}, images, weights, train=True, mutable=["batch_stats"])
    return jnp.argmax(logits, -1)


def one_hot(genotype: Genotype, names: tuple[str, ...] = OPERATIONS) -> np.ndarray:
    """The mixture [4, names] that is one network."""
    return np.eye(len(names), dtype=np.float32)[[names.index(name) for name in genotype]]
