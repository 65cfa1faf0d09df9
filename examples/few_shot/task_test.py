"""The meta-gradients against dense ones, what happens to a task's row, and the mistakes."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf
from bilevel_flax.checks import UserError
from bilevel_flax.train import config as configs
from bilevel_flax.train import experiment
from examples.few_shot import model, omniglot, solvers, task

CONFIG = Path(__file__).parents[2] / "configs" / "few_shot.py"
RNG = np.random.default_rng(0)
PIXELS = RNG.uniform(0, 255, size=(12, 2, 2))
PROXIMAL, RATE = 0.7, 0.3
BATCH = {  # the drawings as they are, but for one
    "support": 8 * jnp.array([[[0], [1]], [[2], [3]]]),
    "query": 8 * jnp.array([[[4, 5], [6, 7]], [[8, 9], [10, 11]]]) + jnp.array([[[0]], [[3]]]),
    "task": jnp.array([2, 0]),
}
SGD = {"outer": optax.sgd(1.0), "inner_rate": RATE}


def apply(params, images):
    return jnp.tanh(images.reshape(len(images), -1) @ params["w"]) * params["s"]


def start(rows: int):
    x = {"w": jnp.asarray(RNG.normal(size=(4, 2))), "s": jnp.array(1.5)}
    return jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape)), x), x


def flat_losses(x):
    """CE of a task as functions of one vector, and x as such."""
    vector, back = ravel_pytree(x)

    def loss(vector, codes):
        images, labels = omniglot.drawn(jnp.asarray(PIXELS), codes)
        logits = apply(back(vector), images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, vector, back


def stepped(make, x, z, proximal, first_order=False, **settings):
    """-D_x: the way that x moves under SGD with step 1."""
    problem = task.make_problem(apply, jnp.asarray(PIXELS), proximal, first_order, at_once=1)
    solver = make(problem, **SGD, **settings)
    state = solver.init(z, x)
    new, _ = jax.jit(solver.update)(state, bf.Batch(BATCH, BATCH))
    return jax.tree.map(jnp.subtract, x, new.outer_params)


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), found, wanted)


def test_implicit_maml_is_the_dense_implicit_gradient(x64):
    z, x = start(2)
    loss, vector, back = flat_losses(x)
    total = jnp.zeros_like(vector)
    inner = lambda p, support: loss(p, support) + 0.5 * PROXIMAL * jnp.sum((p - vector) ** 2)
    gradient, hessian = jax.grad(inner), jax.hessian(inner)

    @jax.jit
    def of_task(support, query):
        newton = lambda _, p: p - jnp.linalg.solve(hessian(p, support), gradient(p, support))
        p = jax.lax.fori_loop(0, 30, newton, vector)
        by_query = jax.grad(loss)(p, query)
        return PROXIMAL * jnp.linalg.solve(hessian(p, support), by_query) / 2

    for support, query in zip(BATCH["support"], BATCH["query"], strict=True):
        total = total + of_task(support, query)
    found = stepped(solvers.imaml, x, z, PROXIMAL, inner_steps=200, adjoint_steps=9)
    close(found, back(total))


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_is_backprop_through_the_steps(first_order, x64):
    z, x = start(2)
    loss, vector, back = flat_losses(x)

    def adapted(vector, support, query):
        p = vector
        for _ in range(3):
            step = RATE * jax.grad(loss)(p, support)
            p = p - (jax.lax.stop_gradient(step) if first_order else step)
        return loss(p, query) / 2

    pairs = zip(BATCH["support"], BATCH["query"], strict=True)
    gradient = jax.jit(jax.grad(adapted))
    total = jnp.zeros_like(vector)
    for support, query in pairs:
        total += gradient(vector, support, query)
    close(stepped(solvers.maml, x, z, 0.0, first_order, inner_steps=3), back(total))


def test_losses_are_of_the_rows_of_their_tasks_and_of_scaled_queries():
    # The loop asks for derivatives on all of z before its first step, the solver on rows alone.
    _, x = start(3)
    z = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=(3, *leaf.shape))), x)
    rows = jax.tree.map(lambda leaf: leaf[BATCH["task"]], z)
    more: dict[str, Any] = {"at_once": 1, "query_scale": 3.0}
    problem = task.make_problem(apply, jnp.asarray(PIXELS), PROXIMAL, **more)

    def direct(row, codes):
        images, labels = omniglot.drawn(jnp.asarray(PIXELS), codes)
        params = task.adapted(x, jax.tree.map(lambda leaf: leaf[row], rows))
        return task.cross_entropy(3 * apply(params, images), labels)

    @jax.jit
    def losses():
        alone = BATCH | {"task": jnp.arange(2)}
        inner = [problem.inner_loss(z, x, BATCH), problem.inner_loss(rows, x, alone)]
        means = sum(direct(row, codes) for row, codes in enumerate(BATCH["query"])) / 2
        return inner, [problem.outer_loss(z, x, BATCH), means]

    for found, wanted in losses():
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert bf.oracles.probe(problem, bf.Variables(z, z, x), BATCH).mode == "forward_over_reverse"


def test_the_network_is_one_of_strided_convolutions():
    params = jax.jit(lambda key: model.init(key, 3) | model.head(3, 5))(jax.random.PRNGKey(0))
    images = jax.random.uniform(jax.random.PRNGKey(1), (2, omniglot.SIDE, omniglot.SIDE))
    assert jax.eval_shape(model.apply, params, images).shape == (2, 5)
    hidden = jax.random.normal(jax.random.PRNGKey(2), (2, 7, 7, 3))
    kernel = params["kernel1"].reshape(3, 3, 3, 3)
    wanted = jax.lax.conv_general_dilated(
        hidden, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(model._patches(hidden) @ params["kernel1"], wanted, atol=1e-5)


def archive(folder: Path, drawers: int = 3) -> Path:
    """Two alphabets, of 2 and 3 characters."""
    from PIL import Image

    with zipfile.ZipFile(folder / omniglot.FILES[0], "w") as file:
        for alphabet, count in (("One", 2), ("Two", 3)):
            for character in range(count):
                for drawer in range(drawers):
                    image = io.BytesIO()
                    Image.new("1", (35, 35), character % 2).save(image, "PNG")
                    name = f"images/{alphabet}/character{character:02d}/{drawer:02d}.png"
                    file.writestr(name, image.getvalue())
    return folder


def test_tasks_have_different_characters_and_apart_drawings(tmp_path):
    characters = omniglot.distorted(omniglot.read(archive(tmp_path)), 3)
    assert characters.images.shape == (5, 3, 4, omniglot.SIDE, omniglot.SIDE)
    sizes = functools.partial(omniglot.draw, ways=3, shots=1, queries=2, count=20, seed=0)
    for augment in (False, True):
        found = sizes(characters, ["Two"], "key", augment=augment)
        codes = np.concatenate([found.support, found.query], -1)
        positions, symmetry = np.divmod(codes, omniglot.SYMMETRIES)
        drawings, copy = np.divmod(positions, 4)
        assert all(len(set(one.ravel())) == 9 for one in drawings)
        assert (drawings // 3 >= 2).all() and (drawings // 3 == drawings[..., :1] // 3).all()
        assert (symmetry == symmetry[..., :1]).all()
        assert len(np.unique(copy)) == (4 if augment else 1)
        assert len(np.unique(symmetry)) == (8 if augment else 1)


def test_the_symmetries_are_those_of_a_square():
    pixels = jnp.asarray(RNG.uniform(0, 255, (1, 3, 3)))
    found = np.asarray(omniglot.drawn(pixels, jnp.arange(8)[:, None])[0])
    square = np.asarray(pixels[0]) / 255
    wanted = [np.rot90(side, k) for side in (square, square.T) for k in range(4)]
    order = lambda images: sorted(map(tuple, np.reshape(images, (8, 9)).round(5)))
    assert order(found) == order(wanted)
    np.testing.assert_allclose(found[0], square, rtol=1e-6)


def test_prototypes_are_the_means_of_the_supports():
    features = lambda x, images: x["w"] * images.reshape(len(images), -1)
    logits = task.by_prototypes(features, jnp.asarray(PIXELS))
    one = {"support": 8 * jnp.array([[0, 1], [2, 3]]), "query": 8 * jnp.array([[4], [5]])}
    found = jax.jit(logits)({"w": 2.0, "temperature": 3.0}, one)
    flat = 2 * PIXELS.reshape(12, 4) / 255
    means = flat[:4].reshape(2, 2, 4).mean(1)
    wanted = -3 * ((flat[4:6, None] - means) ** 2).mean(-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


DRAW: dict[str, Any] = {"ways": 2, "shots": 1, "queries": 2, "count": 1, "seed": 0}
MISTAKES = {
    "an unknown alphabet": (["Three"], {}, "key=Three: no such alphabet, there are One, Two"),
    "too few characters": (["One"], {"ways": 3}, r"--config.ways=3: key \(One\) has 2 characters"),
    "too few drawings": (["One"], {"queries": 3}, "each character has 3 drawings"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_tasks_that_cannot_be_drawn_are_named(name, tmp_path):
    alphabets, changes, message = MISTAKES[name]
    characters = omniglot.read(archive(tmp_path))
    with pytest.raises(UserError, match=message):
        omniglot.draw(characters, alphabets, "key", **DRAW | changes)


def test_tasks_with_different_numbers_of_ways_are_named(tmp_path):
    characters = omniglot.read(archive(tmp_path))
    draw = functools.partial(omniglot.draw, characters, ["Two"], "key")
    other: dict[str, Any] = DRAW | {"ways": 3}
    tasks = [draw(**DRAW), draw(**other)]
    with pytest.raises(UserError, match=r"tasks\[1\] has 3 ways, .*, tasks\[0\] 2 ways"):
        omniglot.stack(tasks)
    assert omniglot.stack(tasks[:1] * 2).support.shape == (2, 2, 1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ([], "--config.data.manual_dir is missing"),
        (["data.manual_dir=/nowhere"], "--config.data.manual_dir=/nowhere holds no images_"),
        (["ways=1"], "--config.ways must be an integer >= 2, got 1"),
        (["batch_size=0"], "--config.batch_size must be an integer >= 1, got 0"),
        (["copies=-1"], "--config.copies must be an integer >= 0, got -1"),
        (["adapt_steps=0"], "--config.adapt_steps must be an integer >= 1, got 0"),
        (["inner_rate=-0.1"], "--config.inner_rate must be a positive number .*, got -0.1"),
        (["proximal=0.0"], "--config.proximal must be a positive number .*, got 0.0"),
        (["tasks=10"], "--config.tasks=10: not a multiple"),
        (["method=reptile"], "--config.method=reptile.*imaml"),
        (['data.test=("Greek",)'], "--config.data.test=Greek is in --config.data.train"),
    ],
)
def test_a_mistake_in_the_config_is_named(settings, message, data_dir):
    if "Greek" in message:
        settings = [*settings, f"data.manual_dir={data_dir / 'omniglot'}"]
    with pytest.raises(ValueError, match=message):
        task.make_task(configs.load(str(CONFIG), settings))


@pytest.mark.slow
@pytest.mark.parametrize("method", task.METHODS)
def test_an_initialisation_is_learned(method, data_dir, tmp_path):
    settings = [f"data.manual_dir={data_dir / 'omniglot'}", "steps=200", "eval_every=200"]
    settings += ["evaluated=100", "copies=0"]
    config = configs.load(f"{CONFIG}:{method}", settings)
    assert experiment.train_and_evaluate(config, tmp_path)["test_accuracy"] > 0.5
