"""Few-shot classification: x is an initialisation, z_t what each task adds to it.

    G(z, x) = Σ_t [CE(x + z_t; support_t) + λ/2 ‖z_t‖²]      F(z, x) = mean_t CE(x + z_t; query_t)

where the last layer is z_t's alone. Tasks are an axis of z and of the minibatch, under `vmap`. With
z as a displacement from x, first-order MAML is ∇₂F, MAML differentiates through the steps from
z = 0, and implicit MAML solves (H_t + λ) v_t = -∇₁F, so that D_x = λ (H_t + λ)⁻¹ ∇ of the query's
loss. Prototypical networks, which adapt nothing, are there to compare with.
"""

from __future__ import annotations

import functools
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
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.data import FiniteSum
from bilevel_flax.train.config import ConfigError, check_choice
from bilevel_flax.train.task import InitialValues, Task
from examples.few_shot import model, omniglot
from examples.few_shot.solvers import KEY

METHODS = ("imaml", "tracked", "maml", "first_order", "prototypes")
IMPLICIT = ("imaml", "tracked")
ADAPTS = ("network", "head")  # all of the network, or its last layer
_AT_ONCE = 20  # tasks, where a network is measured
Apply = Callable[[Any, jax.Array], jax.Array]
Logits = Callable[[Any, Any], jax.Array]  # (x, one task) -> [ways * queries, ways]


def make_problem(
    apply: Apply,
    pixels: jax.Array,
    proximal: float,
    first_order: bool = False,
    at_once: int | None = None,
    query_scale: float = 1.0,
) -> bf.Problem:
    """The two losses.

    Args:
        apply: `apply(params, images) -> logits`.
        pixels: the images that tasks point into, [n, height, width] in [0, 255].
        proximal: λ >= 0.
        first_order: G holds x fixed, so that no derivative goes through the adaptation.
        at_once: tasks whose query images are in memory at a time; None: all of them.
        query_scale: F is the CE of the logits times this. What has fitted one image of a class is
            less sure of the others than it is right about them.
    """

    def loss(z, x, codes, scale):
        images, labels = omniglot.drawn(pixels, codes)
        return cross_entropy(scale * apply(adapted(x, z), images), labels)

    def each(z, x, codes, scale=1.0):
        return jax.vmap(loss, (0, None, 0, None))(z, x, codes, scale)

    def rows(z, batch):  # of all tasks' z, where they recur
        return jax.tree.map(lambda leaf: leaf[batch[KEY]], z)

    def inner_loss(z, x, batch):
        x = jax.lax.stop_gradient(x) if first_order else x
        z = rows(z, batch)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(z))
        return jnp.sum(each(z, x, batch["support"])) + 0.5 * proximal * squares

    def outer_loss(z, x, batch):
        z = rows(z, batch)
        if at_once is None:
            return jnp.mean(each(z, x, batch["query"], query_scale))
        # Without the checkpoint the loop would keep every task's activations for its way back.
        one = jax.checkpoint(lambda task: loss(task[0], x, task[1], query_scale))
        return jnp.mean(jax.lax.map(one, (z, batch["query"]), batch_size=at_once))

    return bf.Problem(inner_loss, outer_loss)


def adapted(x: Any, z: Any) -> Any:
    """A network's parameters: x + z where both have a leaf; the last layer is in z alone."""
    return x | {name: leaf + x[name] if name in x else leaf for name, leaf in z.items()}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the images of a task."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def after_adaptation(
    apply: Apply, pixels: jax.Array, start: Any, proximal: float, rate: float, steps: int
) -> Logits:
    """Logits of a task's queries after so many steps of gradient descent on its support.

    Args:
        apply: the network.
        pixels: of all drawings.
        start: z of one task.
        proximal: λ.
        rate: the step size.
        steps: how many.
    """
    problem = make_problem(apply, pixels, proximal)

    def logits(x, task):
        one = jax.tree.map(lambda leaf: leaf[None], task | {KEY: jnp.array(0)})
        first = jax.tree.map(lambda leaf: leaf[None], start)

        def step(z, _):
            grad = bf.oracles.inner_grad(problem, z, x, one)
            return jax.tree.map(lambda a, g: a - rate * g, z, grad), None

        z, _ = jax.lax.scan(step, first, None, length=steps)
        network = adapted(x, jax.tree.map(lambda leaf: leaf[0], z))
        return apply(network, omniglot.drawn(pixels, task["query"])[0])

    return logits


def by_prototypes(features: Apply, pixels: jax.Array) -> Logits:
    """Logits of a task's queries by their distances from the means of the classes.

    References:
        J. Snell, K. Swersky, R. Zemel. Prototypical networks for few-shot learning. NeurIPS 2017.
    """

    def logits(x, task):
        ways = len(task["support"])
        support = features(x, omniglot.drawn(pixels, task["support"])[0])
        query = features(x, omniglot.drawn(pixels, task["query"])[0])
        means = support.reshape(ways, -1, support.shape[-1]).mean(1)
        squares = jnp.mean((query[:, None] - means[None]) ** 2, -1)
        return -x["temperature"] * squares

    return logits


def prototypes_problem(features: Apply, pixels: jax.Array) -> bf.Problem:
    """Prototypical networks: z is the network, and there is no x."""
    logits = by_prototypes(features, pixels)

    def loss(z, x, batch):
        del x
        tasks = {name: batch[name] for name in ("support", "query")}
        found = jax.vmap(logits, (None, 0))(z, tasks)
        _, ways, queries = batch["query"].shape
        labels = jnp.repeat(jnp.arange(ways), queries)
        return jax.vmap(cross_entropy, (0, None))(found, labels).mean()

    return bf.Problem(loss, loss)


def accuracies(logits: Logits) -> Callable[[Any, omniglot.Tasks], np.ndarray]:
    """`of(x, tasks)`: the share of each task's queries that are right, [tasks]."""

    @jax.jit
    def several(x, tasks):
        _, ways, queries = tasks["query"].shape
        labels = jnp.repeat(jnp.arange(ways), queries)
        return jnp.mean(jax.vmap(logits, (None, 0))(x, tasks).argmax(-1) == labels[None], -1)

    def of(x: Any, tasks: omniglot.Tasks) -> np.ndarray:
        size = math.gcd(len(tasks.query), _AT_ONCE)
        starts = range(0, len(tasks.query), size)
        part = lambda i: {name: leaf[i : i + size] for name, leaf in tasks._asdict().items()}
        return np.concatenate([np.asarray(several(x, part(i))) for i in starts])

    return of


def minibatches(tasks: omniglot.Tasks, batch_size: int, seed: int) -> FiniteSum:
    """Tasks in minibatches; `task` is each one's position, its row of z."""
    arrays = tasks._asdict() | {KEY: np.arange(len(tasks.query), dtype=np.int32)}
    return data.partition(arrays, batch_size, seed=seed)


def _check_numbers(config: Any) -> None:
    least = {"ways": 2, "copies": 0}
    counts = ("shots", "queries", "width", "tasks", "batch_size", "tasks_at_once", "evaluated")
    for name in (*least, *counts, *(("adapt_steps",) if config.method != "prototypes" else ())):
        check_count(f"--config.{name}", config[name], least.get(name, 1))
    if config.tasks % config.batch_size:
        raise ConfigError(
            f"--config.tasks={config.tasks}: not a multiple of --config.batch_size="
            f"{config.batch_size}"
        )
    positive = ("inner_rate", "query_scale") if config.method != "prototypes" else ()
    for name in (*positive, *(("proximal",) if config.method in IMPLICIT else ())):
        check_positive(f"--config.{name}", config[name])


def make_task(config: Any) -> Task:
    """The task that `configs/few_shot.py` describes.

    Args:
        config: keys `method`, `adapts`, `ways`, `shots`, `queries`, `width`, `tasks`, `copies`,
            `proximal`, `inner_rate`, `adapt_steps`, `query_scale`, `evaluated`, `batch_size`,
            `tasks_at_once`, `seed`, `data`.

    Raises:
        ConfigError: alphabets that are in two parts, an unknown method.
        UserError: a number out of range, a missing archive or alphabet, too few characters or
            drawings.
    """
    check_choice(f"--config.method={config.method}", config.method, METHODS)
    check_choice(f"--config.adapts={config.adapts}", config.adapts, ADAPTS)
    _check_numbers(config)
    implicit = config.method in IMPLICIT
    characters = omniglot.read(config.data.manual_dir)
    parts = {name: tuple(config.data[name]) for name in ("train", "validation", "test")}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if common := set(parts[first]) & set(parts[second]):
            raise ConfigError(
                f"--config.data.{second}={sorted(common)[0]} is in --config.data.{first} as well: "
                "the alphabets of meta-training, validation and meta-test are to be apart"
            )
    characters = omniglot.distorted(characters, config.copies)

    def tasks_of(part: str, count: int, seed: int, **more: bool) -> omniglot.Tasks:
        shape = {"ways": config.ways, "shots": config.shots, "queries": config.queries}
        key = f"--config.data.{part}"
        return omniglot.draw(characters, parts[part], key, **shape, count=count, seed=seed, **more)

    seed = 3 * config.seed
    train = tasks_of("train", config.tasks, seed, augment=True)
    validation = tasks_of("validation", config.evaluated, seed + 1)
    test = tasks_of("test", config.evaluated, seed + 2)
    pixels = jnp.asarray(characters.images.reshape(-1, omniglot.SIDE, omniglot.SIDE))
    start = model.head(config.width, config.ways)
    if config.adapts == "network":
        start |= jax.tree.map(jnp.zeros_like, model.init(jax.random.PRNGKey(0), config.width))
    if config.method == "prototypes":
        problem = prototypes_problem(model.features, pixels)
        accuracy = accuracies(by_prototypes(model.features, pixels))
    else:
        proximal = config.proximal if implicit else 0.0
        first_order = config.method == "first_order"
        more = {"at_once": config.tasks_at_once, "query_scale": config.query_scale}
        problem = make_problem(model.apply, pixels, proximal, first_order, **more)
        settings = (proximal, config.inner_rate, config.adapt_steps)
        accuracy = accuracies(after_adaptation(model.apply, pixels, start, *settings))
    side = minibatches(train, config.batch_size, config.seed)
    rows = config.tasks if config.method == "tracked" else config.batch_size

    def init(rng: jax.Array) -> InitialValues:
        x = model.init(rng, config.width)
        if config.method == "prototypes":
            return InitialValues(x, jnp.zeros(()))
        z = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape)), start)
        return InitialValues(z, x)

    def measured(name: str, state: bf.TrainState, tasks: omniglot.Tasks) -> dict[str, float]:
        network = state.inner_params if config.method == "prototypes" else state.outer_params
        found = accuracy(network, tasks)
        error = 1.96 * float(found.std()) / len(found) ** 0.5  # tasks drawn from these alphabets
        return {f"{name}_accuracy": float(found.mean()), f"{name}_accuracy_error": error}

    def final_metrics(
        state: bf.TrainState, workdir: Path, log: Callable[[str], None]
    ) -> dict[str, Any]:
        del workdir, log
        if not config.data.look_at_test:
            return {}
        return measured("test", state, test)

    return Task(
        problem=problem,
        init=init,
        inner=side,
        outer=side,
        paired=True,
        evaluate=functools.partial(measured, "validation", tasks=validation),
        final_metrics=final_metrics,
        headline=("test_accuracy",) if config.data.look_at_test else (),
        units=dict.fromkeys(
            [f"{part}_accuracy{end}" for part in ("validation", "test") for end in ("", "_error")],
            "fraction",
        ),
    )
