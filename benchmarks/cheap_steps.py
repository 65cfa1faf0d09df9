"""What a step of `bf.auto` costs in wall time beside a plain AdamW step, exact and cheap.

    python benchmarks/cheap_steps.py [--rounds 5]

Both run in a compiled loop and take turns; the figure is the ratio of the best turns. Data are
random: timings do not depend on values.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from benchmarks import step_time
from benchmarks.rows import Rows, add_argument
from benchmarks.step_cost import Transformer
from bilevel_flax import data
from bilevel_flax.train.step_runner import StepRunner
from examples.mnist_hypercleaning import task
from examples.mnist_hypercleaning.model import make_model

SETTINGS = {
    "exact": {},
    "update_every=4 adjoint_update_every=2": {"update_every": 4, "adjoint_update_every": 2},
    "adjoint_update_every=8": {"adjoint_update_every": 8},
    "update_every=2 adjoint_update_every=8": {"update_every": 2, "adjoint_update_every": 8},
    "update_every=5 adjoint_update_every=2": {"update_every": 5, "adjoint_update_every": 2},
    "z alone": {"update_every": 1000},
    "subsample=.25": {"subsample": 0.25},
}
COUNT, BATCH = 4096, 64


def cleaning(name: str):
    """(problem, parameters, model state, data) of the example's MLP or CNN on 28 x 28 images."""
    model, rng = make_model(name, 10), np.random.default_rng(0)
    images = rng.normal(size=(COUNT, 28, 28, 1)).astype(np.float32)
    labels = rng.integers(0, 10, COUNT).astype(np.int32)
    problem = task.make_problem(model, bf.outer.sigmoid(COUNT), 1e-4)
    variables = dict(model.init(jax.random.PRNGKey(0), images[:1], train=False))
    params = variables.pop("params")
    arrays = {"image": images, "label": labels}
    return problem, params, variables if model.stateful else None, arrays


def sequences():
    """The same for a transformer of 6 layers on 64 bytes, a weight for each sequence."""
    model, rng = Transformer(), np.random.default_rng(0)
    tokens = rng.integers(0, 256, (COUNT, 64)).astype(np.int32)
    params = model.init(jax.random.PRNGKey(0), tokens[:1])

    def losses(z, batch):
        logits = jnp.asarray(model.apply(z, batch["tokens"]))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean(
            -1
        )

    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(jax.nn.sigmoid(x) * losses(z, batch)),
        lambda z, x, batch: jnp.mean(losses(z, batch)),
        per_sample=True,
    )
    return problem, params, None, {"tokens": tokens}


def measure(name: str, rounds: int, rows: Rows) -> None:
    """A network's rows."""
    problem, params, model_state, arrays = sequences() if name == "transformer" else cleaning(name)
    batch = 16 if name == "transformer" else BATCH
    inner, outer = (data.partition(arrays, batch, seed=seed) for seed in (0, 1))
    optimizer = optax.adamw(1e-3)
    for label, settings in SETTINGS.items():
        solver = bf.auto(problem, inner=optimizer, steps=10_000, **settings)
        state = solver.init(params, jnp.full(COUNT, -2.0), model_state=model_state)
        loop = StepRunner(solver, inner, outer, on_device=True)
        bilevel, plain = step_time.over_plain(loop, problem, optimizer, state, rounds=rounds)
        loop.close()
        row = {"network": name, "setting": label, "units": f"{solver.method.units:.2f}"}
        row["x plain"] = f"{bilevel / plain:.2f}"
        rows.add({**row, "ms": f"{1e3 * bilevel:.2f}", "plain ms": f"{1e3 * plain:.2f}"})


def main() -> None:
    """Prints a row for each network and setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=["mlp", "cnn", "transformer"])
    add_argument(parser)
    options = parser.parse_args()
    with Rows(options.markdown) as rows:
        for name in options.tasks:
            measure(name, options.rounds, rows)


if __name__ == "__main__":
    main()
