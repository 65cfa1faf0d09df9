"""The test accuracy of all 64 networks: trains what is missing in the table.

    python -m examples.darts.collapse.table --manual-dir DIR

DIR holds MNIST's original files. Each network is trained with ten seeds on as many digits of
mnist5k as a search has, drawn by the seed, and tested on MNIST's 10,000 test digits, normalised by
their own statistics. The table is written after each training; the same command goes on. Three
minutes of one core.
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

from bilevel_flax import data
from examples.darts.accuracies import Accuracies
from examples.darts.collapse import space
from examples.darts.collapse.space import Genotype
from examples.darts.micro import data as micro_data

PATH = Path(__file__).with_name("table.csv")
SEEDS, EXAMPLES = 10, 256
STEPS, BATCH_SIZE, LEARNING_RATE = 500, 32, 0.01
TABLE = Accuracies(
    "this space",
    PATH,
    space.genotypes(),
    ("genotype",),
    [(" ".join(genotype),) for genotype in space.genotypes()],
    SEEDS,
)
read, complete = TABLE.read, TABLE.complete


def make_trainer(
    train: micro_data.Digits, test: micro_data.Digits, steps: int = STEPS
) -> Callable[[Genotype, int], float]:
    """`trainer(genotype, seed) -> test accuracy`; one compiled program for all networks.

    Args:
        train: what EXAMPLES digits are drawn from, the same for all networks of a seed.
        test: digits.
        steps: of Adam with a cosine to 0.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    @jax.jit
    def fit(key: jax.Array, weights: jax.Array, examples: dict[str, jax.Array]) -> jax.Array:
        of_z, order = jax.random.split(key)
        z = space.init(of_z)

        def step(carry, key):
            z, opt_state = carry
            rows = jax.random.randint(key, (BATCH_SIZE,), 0, EXAMPLES)
            batch = jax.tree.map(lambda leaf: leaf[rows], examples)
            gradient = jax.grad(space.training_loss)(z, weights, batch)
            updates, opt_state = optimizer.update(gradient, opt_state, z)
            return (optax.apply_updates(z, updates), opt_state), None

        start = (z, optimizer.init(z))
        final: Any = jax.lax.scan(step, start, jax.random.split(order, steps))[0][0]
        return jnp.asarray(space.Network().apply({"params": final}, test.image, weights)).argmax(-1)

    def trainer(genotype: Genotype, seed: int) -> float:
        rows = data.stratified(train.label, {"train": EXAMPLES}, seed=seed)["train"]
        examples = {"image": train.image[rows], "label": train.label[rows]}
        key = jax.random.fold_in(jax.random.key(seed), space.genotypes().index(genotype))
        return float(np.mean(np.asarray(fit(key, space.one_hot(genotype), examples)) == test.label))

    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train what the table lacks.")
    parser.add_argument("--manual-dir", required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=PATH, metavar="CSV", help="default: the table")
    parsed = parser.parse_args(arguments)
    test = micro_data.test_digits(parsed.manual_dir)
    test = micro_data.Digits(
        space.digits(test.image, micro_data.all_digits().image), np.asarray(test.label)
    )
    trainer = make_trainer(space.training_digits(), test)
    complete(trainer, parsed.out, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
