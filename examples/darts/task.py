"""Architecture search in DARTS's space: logits of operations learned while the network trains.

With logits x for every edge of two cells, shares softmax(x), and a network N(z, x) in which each
edge computes the operations weighted by their shares,

    G(z, x) = mean CE(N(z, x)) on one half of the data       F(z, x) = the same on the other half

Normalisation is by the minibatch in both, as in the paper, so minibatches are components of a
finite sum, and nothing but z and x is learned.

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.outer import architecture
from bilevel_flax.train.config import ConfigError, check_choice
from bilevel_flax.train.task import InitialValues, Task
from examples.darts import draw, genotype
from examples.darts.images import Images, load_images
from examples.darts.network import SearchNetwork, Stack, make_stack, search_parameters
from examples.darts.selection import before_rise, perturbed
from examples.darts.shares import named_shares

SELECTIONS = ("strongest", "perturbation")
STOPS = ("last", "residual")
MIXTURE = architecture.mixture(
    {name: len(genotype.EDGES) for name in genotype.CELLS}, genotype.OPERATIONS
)


def stack_of(config: Any, image_size: int) -> Stack:
    """The stack that `config.network` describes, for images of that size.

    Raises:
        ConfigError: as `make_stack`; cells of one kind only.
    """
    network = config.network
    stack = make_stack(
        image_size, network.width, network.cells, network.reductions, network.stem_stride
    )
    if len(set(stack.reductions)) < 2:
        kind = "reduction" if stack.reductions[0] else "normal"
        raise ConfigError(
            f"--config.network.reductions={network.reductions}: all {network.cells} cells are "
            f"{kind} cells, and a search learns both kinds"
        )
    return stack


def make_problem(network: SearchNetwork) -> bf.Problem:
    """The two losses, alike but for their data."""

    def loss(z, x, batch):
        logits = network.apply({"params": z}, batch["image"], MIXTURE.weights(x))
        each = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), batch["label"])
        return bf.masked_mean(each, batch.get("mask"))

    return bf.Problem(loss, loss)


def make_task(config: Any, images: Images | None = None) -> Task:
    """The task that `configs/darts_mnist.py` and `configs/darts_cifar10.py` describe.

    Args:
        config: keys `network` (`width`, `cells`, `reductions`, `stem_stride`, `as_matrix`), `data`,
            `batch_size`, `selection`, `stop`, `health.every`, `seed`.
        images: the data; None: what `config.data` asks for.

    Raises:
        ConfigError: images too small for the reductions, an unknown selection or stop.
        ValueError: data that cannot be had.
    """
    for key, known in (("selection", SELECTIONS), ("stop", STOPS)):
        check_choice(f"--config.{key}={config[key]}", config[key], known)
    if config.stop == "residual" and config.health.every == 0:
        raise ConfigError(
            "--config.stop=residual needs the run's measurements of the adjoint: set "
            "--config.health.every=100"
        )
    images = load_images(config) if images is None else images
    stack = stack_of(config, images.train.image.shape[1])
    network = SearchNetwork(stack, images.num_classes, config.network.as_matrix)
    problem = make_problem(network)
    held = images.held_out
    batch_size = min(250, len(held.label))
    judged = data.partition(held._asdict(), batch_size, shuffle=False)

    @jax.jit
    def count_wrong(z, weights, batch):
        logits = jnp.asarray(network.apply({"params": z}, batch["image"], weights))
        return ((logits.argmax(-1) != batch["label"]) * batch.get("mask", 1.0)).sum()

    def error(z: Any, weights: Any) -> float:
        batches = (data.gather(judged, np.array(i)) for i in range(judged.num_batches))
        return sum(float(count_wrong(z, weights, batch)) for batch in batches) / judged.num_samples

    def init(rng: jax.Array) -> InitialValues:
        z_rng, x_rng = jax.random.split(rng)
        return InitialValues(
            search_parameters(network, z_rng, images.train.image.shape[1:]), MIXTURE.init(x_rng)
        )

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        weights = MIXTURE.weights(state.outer_params)
        return {"validation_error": error(state.inner_params, weights), **named_shares(weights)}

    def final_metrics(
        state: bf.TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        weights = jax.tree.map(np.asarray, MIXTURE.weights(state.outer_params))
        step, chosen = config.steps, weights
        if config.stop == "residual":
            step, chosen = before_rise(workdir, weights)
        if config.selection == "perturbation":
            chosen = perturbed(functools.partial(error, state.inner_params), chosen)
        derived = genotype.derive(chosen)
        path = genotype.save(workdir / "genotype.json", derived)
        draw.save(workdir, derived)
        log(f"genotype: {path}; python -m examples.darts.retrain --genotype {path} trains it")
        return {
            "supernet_validation_error": error(state.inner_params, weights),
            "stopped_at": step,
            "skip_fraction": genotype.share_of(derived, "skip_connect"),
            "collapsed": genotype.collapsed(derived),
            "genotype": genotype.as_json(derived),
        }

    return Task(
        problem=problem,
        init=init,
        inner=data.partition(images.train._asdict(), config.batch_size, seed=config.seed),
        outer=data.partition(images.validation._asdict(), config.batch_size, seed=config.seed),
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=("supernet_validation_error", "skip_fraction"),
        units={
            "validation_error": "fraction",
            "supernet_validation_error": "fraction",
            "skip_fraction": "fraction",
            "inner_loss": "nats",
            "outer_loss": "nats",
        },
    )
