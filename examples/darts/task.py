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
from bilevel_flax.config import ConfigError, nearest
from bilevel_flax.outer import architecture
from bilevel_flax.task import Start, Task
from bilevel_flax.writers import read_metrics
from examples.darts import draw, genotype
from examples.darts.images import Images, load_images
from examples.darts.network import SearchNetwork, Stack, make_stack, search_parameters

PREFIX = "_share/"  # of the operations' shares in metrics.jsonl
SELECTIONS = ("strongest", "perturbation")
STOPS = ("last", "residual")
MIXTURE = architecture.mixture(
    {name: len(genotype.EDGES) for name in genotype.CELLS}, genotype.OPERATIONS
)


def stack_of(config: Any, image_size: int) -> Stack:
    """The stack that `config.network` describes, for images of that size.

    Raises:
        ConfigError: as `make_stack`.
    """
    network = config.network
    return make_stack(
        image_size, network.width, network.cells, network.reductions, network.stem_stride
    )


def make_problem(network: SearchNetwork) -> bf.Problem:
    """The two losses, alike but for their data."""

    def loss(z, x, batch):
        logits = network.apply({"params": z}, batch["image"], MIXTURE.weights(x))
        found = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), batch["label"])
        return bf.masked_mean(found, batch.get("mask"))

    return bf.Problem(loss, loss)


def make_task(config: Any, images: Images | None = None) -> Task:
    """The task that `configs/darts_mnist.py` and `configs/darts_cifar10.py` describe.

    Args:
        config: keys `network` (`width`, `cells`, `reductions`, `stem_stride`, `as_matrix`), `data`,
            `batch_size`, `selection`, `stop`, `seed`.
        images: the data; None: what `config.data` asks for.

    Raises:
        ConfigError: images too small for the reductions, an unknown selection or stop.
        ValueError: data that cannot be had.
    """
    for key, known in (("selection", SELECTIONS), ("stop", STOPS)):
        if config[key] not in known:
            raise ConfigError(
                f"--config.{key}={config[key]}: choose one of {', '.join(known)}"
                f"{nearest(config[key], known)}"
            )
    images = load_images(config) if images is None else images
    stack = stack_of(config, images.train.image.shape[1])
    network = SearchNetwork(stack, images.num_classes, config.network.as_matrix)
    problem = make_problem(network)
    held = images.held_out
    batch_size = min(250, len(held.label))
    judged = data.partition(held._asdict(), batch_size, shuffle=False)

    @jax.jit
    def wrong(z, weights, image, label):
        return jnp.argmax(network.apply({"params": z}, image, weights), axis=-1) != label

    def error(z: Any, weights: Any) -> float:
        count = 0.0
        for i in range(judged.num_batches):
            batch = jax.tree.map(lambda leaf, i=i: leaf[i], judged.batches)
            count += float((wrong(z, weights, batch["image"], batch["label"])
                            * batch.get("mask", 1.0)).sum())  # fmt: skip
        return count / judged.num_samples

    def init(rng: jax.Array) -> Start:
        z_rng, x_rng = jax.random.split(rng)
        return Start(
            search_parameters(network, z_rng, images.train.image.shape[1:]), MIXTURE.init(x_rng)
        )

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        weights = MIXTURE.weights(state.outer_params)
        return {"validation_error": error(state.inner_params, weights), **named_shares(weights)}

    def finish(state: bf.TrainState, workdir: Path, say: Callable[[str], None]) -> dict[str, Any]:
        weights = jax.tree.map(np.asarray, MIXTURE.weights(state.outer_params))
        step = config.steps
        if config.stop == "residual":
            step, weights = before_rise(workdir, weights)
        chosen = weights
        if config.selection == "perturbation":
            chosen = perturbed(functools.partial(error, state.inner_params), weights)
        found = genotype.derive(chosen)
        path = genotype.save(workdir / "genotype.json", found)
        draw.save(workdir, found)
        say(f"genotype: {path}; python -m examples.darts.retrain --genotype {path} trains it")
        return {
            "supernet_validation_error": error(state.inner_params, MIXTURE.weights(
                state.outer_params)),
            "stopped_at": step,
            "skip_fraction": genotype.share_of(found, "skip_connect"),
            "collapsed": genotype.collapsed(found),
            "genotype": genotype.as_json(found),
        }  # fmt: skip

    return Task(
        problem=problem,
        init=init,
        inner=data.partition(images.train._asdict(), config.batch_size, seed=config.seed),
        outer=data.partition(images.validation._asdict(), config.batch_size, seed=config.seed),
        evaluate=evaluate,
        finish=finish,
        headline=("supernet_validation_error", "skip_fraction"),
    )


def named_shares(weights: Any) -> dict[str, float]:
    """The shares by names such as "_share/normal/0-2/skip_connect": cell, states, operation."""
    return {
        f"{PREFIX}{cell}/{start}-{end}/{operation}": float(share)
        for cell in genotype.CELLS
        for (start, end), row in zip(genotype.EDGES, np.asarray(weights[cell]), strict=True)
        for operation, share in zip(genotype.OPERATIONS, row, strict=True)
    }


def read_shares(workdir: Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """(steps, {cell: [steps, 14, 8]}): the shares over a run, from its metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    probe = named_shares({cell: np.zeros((14, 8)) for cell in genotype.CELLS})
    rows = [row for row in rows if all(name in row for name in probe)]
    values = np.array([[row[name] for name in probe] for row in rows], np.float64)
    values = values.reshape(len(rows), len(genotype.CELLS), 14, 8)
    return (
        [int(row["step"]) for row in rows],
        {cell: values[:, i] for i, cell in enumerate(genotype.CELLS)},
    )


def before_rise(workdir: Path, weights: Any) -> tuple[int, Any]:
    """(step, shares) before the adjoint's residual rises for good; the last where it does not."""
    steps, shares = read_shares(workdir)
    if not steps:
        return 0, weights
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "adjoint_residual" in row]
    signal = [row["adjoint_residual"] for row in rows]
    stop = rows[architecture.stop_before_rise(signal, window=max(1, len(signal) // 10))]["step"]
    at = max(0, int(np.searchsorted(steps, stop, side="right")) - 1)
    return steps[at], {cell: values[at] for cell, values in shares.items()}


def perturbed(error: Callable[[Any], float], weights: Any) -> dict[str, np.ndarray]:
    """Shares in which each edge has the operation whose removal hurts most, alone.

    How strong an edge is stays what its strongest operation's share was.
    """
    found = {cell: np.array(values, np.float64) for cell, values in weights.items()}
    for cell, values in weights.items():
        score = lambda tried, cell=cell: -error({**weights, cell: tried})
        names = architecture.select_by_perturbation(
            score, values, genotype.OPERATIONS, leave_out=("none",)
        )
        strength = found[cell][:, 1:].max(1)
        found[cell][:] = 0
        places = [genotype.OPERATIONS.index(name) for name in names]
        found[cell][np.arange(len(names)), places] = strength
        found[cell][:, 0] = 1 - strength
    return found
