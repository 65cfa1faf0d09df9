"""Few-shot classification: x is an initialisation, z_t what each task adds to it.

    G(z, x) = Σ_t [CE(x + z_t; support_t) + λ/2 ‖z_t‖²]      F(z, x) = mean_t CE(x + z_t; query_t)

Tasks are an axis of z and of the minibatch, under `vmap`. With z as a displacement from x,
first-order MAML is ∇₂F, MAML differentiates through the steps from z = 0, and implicit MAML solves
(H_t + λ) v_t = -∇₁F, so that D_x = λ (H_t + λ)⁻¹ ∇ of the query's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.checks import check_count
from bilevel_flax.data import FiniteSum
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.task import InitialValues, Task
from examples.few_shot import baselines, model, omniglot

_AT_ONCE = 20  # tasks, where a network is measured
Apply = Callable[[Any, jax.Array], jax.Array]


def make_problem(
    apply: Apply, pixels: jax.Array, proximal: float, first_order: bool = False
) -> bf.Problem:
    """The two losses.

    Args:
        apply: `apply(params, images) -> logits`.
        pixels: the images that tasks point into, [n, height, width] in [0, 255].
        proximal: λ >= 0.
        first_order: G holds x fixed, so that no derivative goes through the adaptation.
    """

    def losses(z, x, positions):
        images, labels = drawn(pixels, positions)
        logits = apply(jax.tree.map(jnp.add, x, z), images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def each(z, x, batch, part):
        return jax.vmap(losses, (0, None, 0))(z, x, batch[part])

    def inner_loss(z, x, batch):
        x = jax.lax.stop_gradient(x) if first_order else x
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(z))
        return jnp.sum(each(z, x, batch, "support")) + 0.5 * proximal * squares

    def outer_loss(z, x, batch):
        return jnp.mean(each(z, x, batch, "query"))

    return bf.Problem(inner_loss, outer_loss)


def drawn(pixels: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images in [0, 1] and labels at positions [ways, each] of a task."""
    ways, each = positions.shape
    return pixels[positions.reshape(-1)] / 255.0, jnp.repeat(jnp.arange(ways), each)


def adapted_accuracy(
    apply: Apply, pixels: jax.Array, x: Any, tasks: omniglot.Tasks, proximal: float, settings: Any
) -> np.ndarray:
    """The accuracy on each task's queries after adaptation, [tasks].

    Args:
        apply: the network.
        pixels: of all drawings.
        x: the initialisation.
        tasks: which.
        proximal: λ while adapting.
        settings: (step size, number of steps).
    """
    rate, steps = settings
    problem = make_problem(apply, pixels, proximal)

    def right(z, query):
        images, labels = drawn(pixels, query)
        return jnp.mean(jnp.argmax(apply(jax.tree.map(jnp.add, x, z), images), -1) == labels)

    @jax.jit
    def several(batch):
        z = jax.tree.map(lambda leaf: jnp.zeros((len(batch["query"]), *leaf.shape)), x)

        def step(z, _):
            grad = bf.oracles.inner_grad(problem, z, x, batch)
            return jax.tree.map(lambda a, g: a - rate * g, z, grad), None

        z, _ = jax.lax.scan(step, z, None, length=steps)
        return jax.vmap(right)(z, batch["query"])

    size = math.gcd(len(tasks.query), _AT_ONCE)
    parts = [
        {name: leaf[i : i + size] for name, leaf in tasks._asdict().items()}
        for i in range(0, len(tasks.query), size)
    ]
    return np.concatenate([np.asarray(several(part)) for part in parts])


def minibatches(tasks: omniglot.Tasks, batch_size: int, seed: int) -> FiniteSum:
    """Tasks in minibatches; `task` is each one's position."""
    arrays = tasks._asdict() | {"task": np.arange(len(tasks.query), dtype=np.int32)}
    return data.partition(arrays, batch_size, seed=seed)


def make_task(config: Any) -> Task:
    """The task that `configs/few_shot.py` describes.

    Args:
        config: keys `ways`, `shots`, `queries`, `width`, `tasks`, `recurring`, `proximal`,
            `inner_rate`, `inner_steps`, `adapt_steps`, `evaluated`, `batch_size`, `steps`, `seed`,
            `baselines`, `unrolled_steps`, `unrolled_rate`, `learning_rate`, `data`.

    Raises:
        ConfigError: alphabets that are in two parts, a λ that is not positive.
        UserError: a missing archive or alphabet, too few characters or drawings.
    """
    for name in ("ways", "shots", "queries", "width", "tasks", "evaluated"):
        check_count(f"--config.{name}", config[name])
    if config.tasks % config.batch_size:
        raise ConfigError(
            f"--config.tasks={config.tasks}: not a multiple of --config.batch_size="
            f"{config.batch_size}"
        )
    if not config.proximal > 0:
        raise ConfigError(f"--config.proximal={config.proximal}: must be above 0")
    characters = omniglot.with_turns(omniglot.read(config.data.manual_dir))
    parts = {name: tuple(config.data[name]) for name in ("train", "validation", "test")}
    for first, second in (("train", "validation"), ("train", "test")):
        if common := set(parts[first]) & set(parts[second]):
            raise ConfigError(
                f"--config.data.{second}={sorted(common)[0]} is in --config.data.{first} as well: "
                "the alphabets of meta-training and meta-test are to be apart"
            )

    def tasks_of(part: str, count: int, seed: int) -> omniglot.Tasks:
        shape = {"ways": config.ways, "shots": config.shots, "queries": config.queries}
        key = f"--config.data.{part}"
        return omniglot.draw(characters, parts[part], key, **shape, count=count, seed=seed)

    seed = 3 * config.seed
    train = tasks_of("train", config.tasks, seed)
    validation = tasks_of("validation", config.evaluated, seed + 1)
    test = tasks_of("test", config.evaluated, seed + 2)
    pixels = jnp.asarray(characters.images.reshape(-1, omniglot.SIDE, omniglot.SIDE))
    problem = make_problem(model.apply, pixels, config.proximal)
    side = minibatches(train, config.batch_size, config.seed)
    rows = config.tasks if config.recurring else config.batch_size
    settings = (config.inner_rate, config.adapt_steps)

    def init(rng: jax.Array) -> InitialValues:
        x = model.init(rng, config.width, config.ways)
        return InitialValues(jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape)), x), x)

    def accuracy(x: Any, tasks: omniglot.Tasks) -> np.ndarray:
        return adapted_accuracy(model.apply, pixels, x, tasks, config.proximal, settings)

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        return {"validation_error": 1 - float(accuracy(state.outer_params, validation).mean())}

    def final_metrics(
        state: bf.TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        del workdir
        found = accuracy(state.outer_params, test)
        results: dict[str, Any] = {"test_accuracy": float(found.mean())}
        results["test_accuracy_error"] = 1.96 * float(found.std()) / len(found) ** 0.5
        if config.baselines:
            start = init(jax.random.split(jax.random.PRNGKey(config.seed))[0])
            results |= baselines.run(config, pixels, train, test, start.outer_params, log)
        return results

    return Task(
        problem=problem,
        init=init,
        inner=side,
        outer=side,
        paired=True,
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=("test_accuracy", *(baselines.HEADLINE if config.baselines else ())),
        units={"test_accuracy": "fraction", "validation_error": "fraction"},
    )
