"""Deep equilibrium network on MNIST digits: z* is a fixed point for each example, x the weights.

    z_i = tanh(W z_i + U image_i + b)      F(z, x) = mean CE(C z_i + c; label_i)

On the examples of a minibatch, the same ones for both. With `states="example"` z and v have a row
for each training example, and each goes on where it was left at its last visit: a few iterations
of the layer and as many of the adjoint a step (`tracked`). With `states="minibatch"` they have a
row for each place in a minibatch, and the fixed point and the adjoint are solved for in every step
(`solved`, by GMRES).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.distribution import extras
from bilevel_flax.train.config import ConfigError, check_choice
from bilevel_flax.train.task import InitialValues, Task
from examples.datasets import sources
from examples.deq import baselines, model
from examples.deq.solvers import KEY

STATES = ("example", "minibatch")
DTYPES = ("float16", "float32")  # of z and v between visits


def make_problem(
    margin: float, step: float, iterations: int, states: str, decay: float
) -> bf.Problem:
    """Condition and loss.

    The condition is z - g(g(...g(z))) with g(z) = z + α (layer(z) - z): it is 0 where z is a fixed
    point of the layer, whatever their number, and z -= c is that many iterations.

    Args:
        margin: m of the layer, > 0.
        step: α.
        iterations: how many g there are, >= 1.
        states: "example": z is [n, width], read at `batch["state"]`; "minibatch": [batch, width].
        decay: half of it times ‖x‖² is added to F.
    """

    def rows(z, batch):
        return z[batch[KEY]] if states == "example" else z

    def condition(z, x, batch):
        here = rows(z, batch)
        apply, after = model.layer(x, margin, batch["image"]), here
        for _ in range(iterations):
            after = after + step * (apply(after) - after)
        value = here - after
        if "mask" in batch:  # padding repeats an example
            value = value * batch["mask"][:, None]
        return jnp.zeros_like(z).at[batch[KEY]].add(value) if states == "example" else value

    def outer_loss(z, x, batch):
        losses = model.cross_entropy(x, rows(z, batch), batch["label"])
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))
        return bf.masked_mean(losses, batch.get("mask")) + 0.5 * decay * squares

    return bf.Problem.from_condition(condition, outer_loss)


def make_task(config: Any) -> Task:
    """The task that `configs/deq.py` describes.

    Args:
        config: keys `width`, `margin`, `step`, `iterations`, `tolerance`, `max_iterations`,
            `states`, `state_dtype`, `decay`, `batch_size`, `steps`, `seed`, `data`; `baselines`,
            and for these `unrolled_steps`, `inner_steps`, `adjoint_steps`, `learning_rate`.

    Raises:
        ConfigError: an unknown `states` or `state_dtype`, a negative decay, a part without
            examples.
        UserError: a number out of range; a fixed point that does not converge (from `evaluate`).
        MissingExtra: optimistix is not installed.
    """
    check_choice(f"--config.states={config.states}", config.states, STATES)
    check_choice(f"--config.state_dtype={config.state_dtype}", config.state_dtype, DTYPES)
    for name in ("margin", "step", "tolerance"):
        check_positive(f"--config.{name}", config[name])
    for name in ("width", "iterations", "max_iterations"):
        check_count(f"--config.{name}", config[name])
    if not config.decay >= 0:
        raise ConfigError(f"--config.decay={config.decay}: must be 0 or more")
    extras.require("fixed_point")  # not only where a network is first measured
    images = sources.load(
        config.data.name,
        manual_dir=config.data.manual_dir,
        data_dir=config.data.data_dir,
        splits=config.data.splits,
        seed=config.seed,
    )
    for part in ("train", "validation", "test"):
        if not len(getattr(images, f"{part}_labels")):
            raise ConfigError(
                f"--config.data.splits={config.data.splits}: no {part} examples of "
                f"{config.data.name}; give the numbers of all three, (train, validation, test)"
            )
    parts = data.standardize(images.train_images, images.validation_images, images.test_images)
    train, validation, test = (part.reshape(len(part), -1).astype(np.float32) for part in parts)
    examples = {
        "image": train,
        "label": images.train_labels,
        KEY: np.arange(len(train), dtype=np.int32),
    }
    side = data.partition(examples, config.batch_size, seed=config.seed)
    rows = len(train) if config.states == "example" else config.batch_size
    settings = (config.step, config.tolerance, config.max_iterations)
    layer = (config.margin, config.step, config.iterations)
    problem = make_problem(*layer, config.states, config.decay)

    def init(rng: jax.Array) -> InitialValues:
        x = model.init(rng, train.shape[1], config.width, images.num_classes)
        return InitialValues(jnp.zeros((rows, config.width), config.state_dtype), x)

    def error(x: model.Weights, pixels: np.ndarray, labels: np.ndarray) -> float:
        z = model.equilibrium(x, config.margin, jnp.asarray(pixels), *settings)
        return float(jnp.mean(jnp.argmax(model.logits(x, z), -1) != labels))

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        return {"validation_error": error(state.outer_params, validation, images.validation_labels)}

    def final_metrics(
        state: bf.TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        x = state.outer_params
        results: dict[str, Any] = {"test_error": error(x, test, images.test_labels)}
        if config.baselines:
            z, start, _ = init(jax.random.split(jax.random.PRNGKey(config.seed))[0])
            measured = (test, images.test_labels)
            results |= baselines.run(config, problem, side, start, z, error, measured, log)
        return results

    return Task(
        problem=problem,
        init=init,
        inner=side,
        outer=side,
        paired=True,
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=("test_error", *(baselines.HEADLINE if config.baselines else ())),
        units={"validation_error": "fraction", "test_error": "fraction"},
    )
