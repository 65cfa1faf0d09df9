"""The penalty method beside SOBA's directions on hypercleaning: error, ranking, time.

    python benchmarks/first_order.py [--steps 3000] [--seeds 2]

An MLP (784-64-10) on `mnist5k` with half of the training labels wrong: `bf.auto` and
`bf.first_order`, which differ in their directions alone, with the same SGD on z.
"""

from __future__ import annotations

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import roc_auc_score

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax import data
from bilevel_flax.train.step_runner import StepRunner
from configs import mnist_hypercleaning
from examples.mnist_hypercleaning.task import load_examples

HIDDEN, CLASSES, BATCH, RATE, DECAY = 64, 10, 64, 0.05, 1e-4


def logits_of(z, images):
    """[batch, 28, 28, 1] -> [batch, 10]."""
    hidden = images.reshape(len(images), -1) @ z["first"] + z["bias"][None]
    return jax.nn.relu(hidden) @ z["second"]


def make_problem(count: int) -> bf.Problem:
    """A sigmoid weight for each of `count` training examples."""
    weights = bf.outer.sigmoid(count)

    def outer_loss(z, x, batch):
        del x
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits_of(z, batch["image"]), batch["label"]
        )
        return bf.masked_mean(each, batch.get("mask"))

    def inner_loss(z, x, batch):
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits_of(z, batch["image"]), batch["label"]
        )
        decay = DECAY * (jnp.sum(z["first"] ** 2) + jnp.sum(z["second"] ** 2))
        return bf.masked_mean(weights.apply(x, batch) * each, batch.get("mask")) + decay

    return bf.Problem(inner_loss, outer_loss, per_sample=True)


def initial(seed: int, pixels: int) -> dict:
    """Scaled normal weights."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "first": jax.random.normal(first, (pixels, HIDDEN)) / pixels**0.5,
        "bias": jnp.zeros(HIDDEN),
        "second": jax.random.normal(second, (HIDDEN, CLASSES)) / HIDDEN**0.5,
    }


def main() -> None:
    """Prints a row for each method and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=2)
    add_argument(parser)
    args = parser.parse_args()
    config = mnist_hypercleaning.get_config()
    config.seed = 0
    examples = load_examples(config)
    train = {"image": examples.train_images, "label": examples.given_labels}
    clean = {"image": examples.validation_images, "label": examples.validation_labels}
    inner, outer = data.partition(train, BATCH), data.partition(clean, BATCH)
    problem = make_problem(inner.num_samples)
    with Rows(args.markdown) as rows:
        for seed, method in itertools.product(range(args.seeds), (bf.auto, bf.first_order)):
            solver = method(problem, inner=optax.sgd(RATE), steps=args.steps)
            x = bf.outer.sigmoid(inner.num_samples).init()
            state = solver.init(initial(seed, examples.train_images[0].size), x)
            loop, step = StepRunner(solver, inner, outer, seed=seed, on_device=True), 0
            loop.compile(state, 0)
            while step < args.steps:
                state, info = loop.run(state, step, args.steps)
                step += len(info.inner_loss)
            guesses = np.argmax(logits_of(state.inner_params, examples.test_images), -1)
            auc = roc_auc_score(examples.is_wrong, -np.asarray(state.outer_params))
            row = {"seed": seed, "method": solver.method.name}
            row["test error"] = f"{np.mean(guesses != examples.test_labels):.4f}"
            row["AUC of wrong labels"] = f"{auc:.4f}"
            rows.add({**row, "CPU µs a step": f"{loop.cpu_seconds / args.steps * 1e6:.0f}"})


if __name__ == "__main__":
    main()
