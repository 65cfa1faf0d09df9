"""A run of a few seconds with everything in it that can be interrupted: config and task.

A weight for each of 256 examples, a network with one hidden layer; `srba` has a full pass every
100 steps, a checkpoint comes every 50.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.solvers import table
from bilevel_flax.train.task import InitialValues, Task


def get_config(solver: str = "srba") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = "small_run"
    config.seed = 0
    config.steps, config.epochs = 1000, 1.0
    config.examples = 256
    config.log_every, config.eval_every = 50, 250
    config.checkpoint = {"every": 50}
    config.health = {"every": 0, "summary": False}
    config.on_device = True
    config.task = {"call": "tests.faults.small_run:make_task"}
    more = {"period": 100} if solver == "srba" else {}
    config.solver = {
        "call": table.qualified_name(solver),
        "inner": {"call": "optax:adam", "learning_rate": 1e-2},
        "outer": {"call": "optax:adam", "learning_rate": 1e-2},
        **more,
    }
    return config


def examples(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    return {
        "image": rng.normal(size=(count, 12)).astype(np.float32),
        "label": rng.integers(0, 3, count).astype(np.int32),
    }


def make_task(config: Any) -> Task:
    def cross_entropy(z, batch):
        hidden = jnp.tanh(batch["image"] @ z["w1"] + z["b1"][None])
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ z["w2"], batch["label"])

    def inner_loss(z, x, batch):
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(z))
        return bf.masked_mean(jax.nn.sigmoid(x) * cross_entropy(z, batch), batch.get("mask")) + (
            1e-3 * decay
        )

    def outer_loss(z, x, batch):
        return bf.masked_mean(cross_entropy(z, batch), batch.get("mask"))

    def init(rng: jax.Array) -> InitialValues:
        first, second = jax.random.split(rng)
        z = {
            "w1": 0.3 * jax.random.normal(first, (12, 16)),
            "b1": jnp.zeros(16),
            "w2": 0.3 * jax.random.normal(second, (16, 3)),
        }
        return InitialValues(z, jnp.zeros(config.examples))

    validation = examples(64)

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        return {"validation_loss": float(cross_entropy(state.inner_params, validation).mean())}

    return Task(
        problem=bf.Problem(inner_loss, outer_loss, per_sample=True),
        init=init,
        inner=data.partition(examples(config.examples), 16, seed=config.seed),
        outer=data.partition(validation, 16, seed=config.seed),
        evaluate=evaluate,
        best_metric="validation_loss",
    )
