"""What an update of each method costs, one after the other in one process.

    python -m examples.few_shot.costs --manual_dir DIR [--ways 20] [--repeats 0] [--markdown]

Beside the library's `unrolled`, which keeps the start of each step alone, stands MAML as it is
usually written: `jax.grad` through a scan of `jax.grad`s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_flax as bf
from bilevel_flax.bench.report import shown
from bilevel_flax.train import config as configs
from bilevel_flax.train.setup import make_solver
from bilevel_flax.train.task import Task
from examples.few_shot import model, omniglot
from examples.few_shot import task as tasks
from examples.step_cost import step_cost

CONFIG = "configs/few_shot.py"
SIZES = ("temporary", "state", "total")


def plain_maml(config: Any, pixels: jax.Array, tx: optax.GradientTransformation) -> Callable:
    """`step((x, opt_state), batch)`, without this library."""

    def loss(params, codes):
        images, labels = omniglot.drawn(pixels, codes)
        return tasks.cross_entropy(model.apply(params, images), labels)

    head = model.head(config.width, config.ways)

    def of_one(x, support, query):
        def step(params, _):
            grad = jax.grad(loss)(params, support)
            return jax.tree.map(lambda p, g: p - config.inner_rate * g, params, grad), None

        return loss(jax.lax.scan(step, x | head, None, length=config.inner_steps)[0], query)

    def mean(x, batch):
        return jnp.mean(jax.vmap(of_one, (None, 0, 0))(x, batch["support"], batch["query"]))

    def step(carry, batch):
        x, opt_state = carry
        updates, opt_state = tx.update(jax.grad(mean)(x, batch), opt_state)
        return optax.apply_updates(x, updates), opt_state

    return step


def main() -> None:
    """Prints a table, a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manual_dir", required=True, help="holds Omniglot's archive")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="chunks of 5 steps; 0: memory alone")
    parser.add_argument("--markdown", action="store_true", help="a table for the results' page")
    options = parser.parse_args()
    rows = []
    settings = [f"data.manual_dir={options.manual_dir}", f"ways={options.ways}", "evaluated=1"]
    for method in tasks.METHODS:
        few = [] if method == "tracked" else ["tasks=400"]  # there, the tables' rows
        config = configs.load(f"{CONFIG}:{method}", settings + few)
        made: Task = tasks.make_task(config)
        z, x, _ = made.init(jax.random.PRNGKey(0))
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), made.inner.batches)
        solver = make_solver(config.solver, made)
        step = lambda state, batch, solver=solver: solver.update(state, bf.Batch(batch, batch))[0]
        measured: dict[str, Any] = {method: (step, solver.init(z, x))}
        if method == "maml":
            images = omniglot.distorted(omniglot.read(options.manual_dir), config.copies).images
            pixels = jnp.asarray(images.reshape(-1, omniglot.SIDE, omniglot.SIDE))
            tx = optax.adam(config.learning_rate)
            measured["plain maml"] = plain_maml(config, pixels, tx), (x, tx.init(x))
        for name, (step, carry) in measured.items():
            cost = step_cost(step, carry, batch, timed=5, repeats=options.repeats)
            sizes = [f"{cost[f'{part}_bytes'] / 1e6:.2f}" for part in SIZES]
            pace = f"{1e3 * cost['seconds_per_step']:.2f}" if options.repeats else ""
            rows.append([name, pace, *sizes])
    header = ["method", "ms a step", *(f"{part} MB" for part in SIZES)]
    print(shown(header, rows, options.markdown))


if __name__ == "__main__":
    main()
