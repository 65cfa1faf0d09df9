"""The penalty method beside SOBA's directions at equal time: error on held-out data, x, time.

    python benchmarks/first_order.py [--seconds 8] [--seeds 2] [--task cleaning mixture]

An MLP (784-64-10) on `mnist5k` with half of the training labels wrong. Cleaning learns a weight for
each example, mixture one for each of four domains of which .2 to .8 are wrong labels. `bf.auto` and
`bf.first_order` differ in their directions alone and have the same SGD on z; each takes as many
steps as it can in the same CPU time, by a pace that is measured first, in turns. Half of the clean
data is F's, the error is that on the other half.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

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
from examples.mnist_hypercleaning.task import Examples, load_examples

HIDDEN, CLASSES, BATCH, RATE, DECAY = 64, 10, 64, 0.05, 1e-4
METHODS = {"auto (SOBA's directions)": bf.auto, "first_order": bf.first_order}
# Shares of the four domains among the right labels; among the wrong ones in the other order.
DOMAINS = (0.4, 0.3, 0.2, 0.1)


def logits_of(z, images):
    """[batch, 28, 28, 1] -> [batch, 10]."""
    hidden = images.reshape(len(images), -1) @ z["first"] + z["bias"][None]
    return jax.nn.relu(hidden) @ z["second"]


def each_loss(z, batch):
    """[batch]."""
    logits = logits_of(z, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


class Weights(NamedTuple):
    """What x is: `apply(x, batch)` [batch], where it starts, whether it has a row an example."""

    apply: Any
    init: Any
    per_sample: bool


def make_problem(weights: Weights) -> bf.Problem:
    """Weighted cross-entropy with a little decay, and cross-entropy on clean data."""

    def outer_loss(z, x, batch):
        del x
        return bf.masked_mean(each_loss(z, batch), batch.get("mask"))

    def inner_loss(z, x, batch):
        decay = DECAY * (jnp.sum(z["first"] ** 2) + jnp.sum(z["second"] ** 2))
        each = weights.apply(x, batch) * each_loss(z, batch)
        return bf.masked_mean(each, batch.get("mask")) + decay

    return bf.Problem(inner_loss, outer_loss, per_sample=weights.per_sample)


def initial(seed: int, pixels: int) -> dict:
    """Scaled normal weights."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "first": jax.random.normal(first, (pixels, HIDDEN)) / pixels**0.5,
        "bias": jnp.zeros(HIDDEN),
        "second": jax.random.normal(second, (HIDDEN, CLASSES)) / HIDDEN**0.5,
    }


def sides(examples: Examples) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """The training data with its domains, F's half of the clean data, and the other half."""
    rng = np.random.default_rng(0)
    shares = np.where(examples.is_wrong[:, None], DOMAINS[::-1], DOMAINS)
    domain = (rng.random((len(shares), 1)) > shares.cumsum(1)[:, :-1]).sum(1)
    train = {
        "image": examples.train_images,
        "label": examples.given_labels,
        "domain": domain.astype(np.int32),
    }
    clean = {"image": examples.validation_images, "label": examples.validation_labels}
    halves = [{name: leaf[part::2] for name, leaf in clean.items()} for part in (0, 1)]
    return data.partition(train, BATCH), data.partition(halves[0], BATCH), halves[1]


def run(runner: StepRunner, state: bf.TrainState, steps: int) -> bf.TrainState:
    """So many updates from the start."""
    step = 0
    while step < steps:
        state, info = runner.run(state, step, steps)
        step += len(info.inner_loss)
    return state


def paces(runners: dict[str, StepRunner], start: Any, steps: int = 200) -> dict[str, float]:
    """CPU seconds of a step of each, the best of three turns."""
    best = dict.fromkeys(runners, np.inf)
    for _ in range(3):
        for name, runner in runners.items():
            state = start(name)
            runner.compile(state, 0)
            runner.rewind()
            run(runner, state, steps)
            best[name] = min(best[name], runner.cpu_seconds / steps)
    return best


def main() -> None:
    """Prints a row for each task, method and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--task", nargs="+", default=["cleaning", "mixture"])
    add_argument(parser)
    args = parser.parse_args()
    config = mnist_hypercleaning.get_config()
    config.seed = 0
    examples = load_examples(config)
    inner, outer, held = sides(examples)
    of_examples = bf.outer.sigmoid(inner.num_samples)
    shares = np.bincount(inner.batches["domain"].reshape(-1), minlength=len(DOMAINS))
    of_domains = bf.outer.domain_weights(len(DOMAINS), shares / shares.sum())
    tasks = {
        "cleaning": Weights(of_examples.apply, of_examples.init, True),
        "mixture": Weights(of_domains.weights, of_domains.init, False),
    }
    with Rows(args.markdown) as rows:
        for task in args.task:
            problem, weights = make_problem(tasks[task]), tasks[task]

            def solver(name, steps, problem=problem):
                return METHODS[name](problem, inner=optax.sgd(RATE), steps=steps)

            def start(name, seed=0, steps=1000, weights=weights, solver=solver):
                z = initial(seed, examples.train_images[0].size)
                return solver(name, steps).init(z, weights.init())

            runners = {
                name: StepRunner(solver(name, 1000), inner, outer, on_device=True)
                for name in METHODS
            }
            for name, pace in paces(runners, start).items():
                steps = round(args.seconds / pace)
                first = None
                for seed in range(args.seeds):
                    runner = StepRunner(
                        solver(name, steps),
                        inner,
                        outer,
                        seed=seed,
                        compiled_as=first,
                        on_device=True,
                    )
                    first = runner
                    state = start(name, seed, steps)
                    runner.compile(state, 0)
                    state = run(runner, state, steps)
                    wrong = (
                        np.argmax(logits_of(state.inner_params, held["image"]), -1) != held["label"]
                    )
                    row = {"method": name, "seed": seed, "steps": steps}
                    row["held-out error"] = f"{wrong.mean():.4f}"
                    if task == "cleaning":
                        auc = roc_auc_score(examples.is_wrong, -np.asarray(state.outer_params))
                        row["AUC of wrong labels"] = f"{auc:.4f}"
                    else:
                        learned = of_domains.shares(state.outer_params)
                        row["shares, cleanest first"] = " ".join(f"{each:.2f}" for each in learned)
                    rows.add({**row, "CPU s": f"{runner.cpu_seconds:.1f}"}, task)


if __name__ == "__main__":
    main()
