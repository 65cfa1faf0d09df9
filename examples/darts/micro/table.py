"""The test accuracy of all 625 networks of the micro-space: trains what is missing in the table.

    python -m examples.darts.micro.table --manual-dir DIR

DIR holds MNIST's original files. Each of the 195 networks that differ is trained three times on the
5,000 digits of mnist5k and tested on MNIST's 10,000 test digits; the other 430 are one of these
under another name (`micro_space.canonical`) and share its row. The table is written after each
training; the same command goes on. About 40 minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.darts.accuracies import Accuracies
from examples.darts.micro import data as micro_data
from examples.darts.micro import space as micro_space
from examples.darts.micro.network import MicroNetwork
from examples.darts.micro.space import Genotype

PATH = Path(__file__).with_name("table.csv")
SEEDS = 3
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 500, 64, 0.02, 1e-3


def number(genotype: Genotype) -> int:
    """Its place in `micro_space.genotypes()`, the row of the table."""
    place = 0
    for name in genotype:
        place = place * len(micro_space.OPERATIONS) + micro_space.OPERATIONS.index(name)
    return place


_SAME = [number(micro_space.canonical(genotype)) for genotype in micro_space.genotypes()]
TABLE = Accuracies(
    "the micro-space",
    PATH,
    micro_space.genotypes(),
    (*(f"edge_{start}_{end}" for start, end in micro_space.EDGES), "same_as"),
    [(*names, str(same)) for names, same in zip(micro_space.genotypes(), _SAME, strict=True)],
    SEEDS,
    _SAME,
)
read, complete = TABLE.read, TABLE.complete


def make_trainer(
    train: micro_data.Digits, test: micro_data.Digits, steps: int = STEPS
) -> Callable[[Genotype, int], float]:
    """`trainer(genotype, seed) -> test accuracy`; one compiled program for all networks.

    Args:
        train: standardised digits.
        test: standardised digits, a multiple of 1,000 of them or fewer.
        steps: of AdamW with a cosine to 0.
    """
    network = MicroNetwork()
    images, labels = jnp.asarray(train.image), jnp.asarray(train.label)
    part = min(1000, len(test.label))
    test_images = jnp.asarray(test.image).reshape(-1, part, *test.image.shape[1:])
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=WEIGHT_DECAY
    )

    @jax.jit
    def fit(key: jax.Array, choices: jax.Array) -> jax.Array:
        start, order = jax.random.split(key)
        variables = dict(network.init(start, images[:1], choices, train=True))
        params: Any = variables.pop("params")
        statistics: Any = variables

        def step(carry, key):
            params, opt_state = carry
            rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(labels))

            def loss(params):
                logits, _ = network.apply(
                    {"params": params, **statistics},
                    images[rows],
                    choices,
                    train=True,
                    mutable=["batch_stats"],
                )
                each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
                return each.mean()

            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        carry = (params, optimizer.init(params))
        (params, _), _ = jax.lax.scan(step, carry, jax.random.split(order, steps))
        # The statistics of all training digits under the last parameters.
        final: Any
        _, final = network.clone(momentum=0.0).apply(
            {"params": params, **statistics}, images, choices, train=True, mutable=["batch_stats"]
        )
        predict = lambda part: jnp.argmax(
            jnp.asarray(network.apply({"params": params, **final}, part, choices, train=False)), -1
        )
        return jax.lax.map(predict, test_images).reshape(-1)

    def trainer(genotype: Genotype, seed: int) -> float:
        choices = np.array([micro_space.OPERATIONS.index(name) for name in genotype], np.int32)
        key = jax.random.fold_in(jax.random.key(seed), number(genotype))
        return float(np.mean(np.asarray(fit(key, choices)) == test.label))

    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train what the table lacks.")
    parser.add_argument("--manual-dir", required=True, metavar="DIR")
    parser.add_argument("--data-dir", metavar="DIR", help="of prepared sets; default: TFDS's")
    parser.add_argument("--out", type=Path, default=PATH, metavar="CSV", help="default: the table")
    parsed = parser.parse_args(arguments)
    digits = micro_data.all_digits()
    test = micro_data.test_digits(parsed.manual_dir, parsed.data_dir)
    trainer = make_trainer(
        micro_data.standardized(digits, digits), micro_data.standardized(test, digits)
    )
    complete(trainer, parsed.out, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
