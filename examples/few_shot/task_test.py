"""The meta-gradients against dense ones, what happens to a task's row, and the mistakes."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

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
BATCH = {
    "support": jnp.array([[[0], [1]], [[2], [3]]]),
    "query": jnp.array([[[4, 5], [6, 7]], [[8, 9], [10, 11]]]),
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

    def loss(vector, positions):
        images, labels = task.drawn(jnp.asarray(PIXELS), positions)
        logits = apply(back(vector), images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, vector, back


def stepped(make, x, z, proximal, first_order=False, **settings):
    """-D_x: the way that x moves under SGD with step 1."""
    problem = task.make_problem(apply, jnp.asarray(PIXELS), proximal, first_order)
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
    gradient, hessian = jax.jit(jax.grad(inner)), jax.jit(jax.hessian(inner))
    for support, query in zip(BATCH["support"], BATCH["query"], strict=True):
        p = vector
        for _ in range(30):
            p = p - jnp.linalg.solve(hessian(p, support), gradient(p, support))
        by_query = jax.grad(loss)(p, query)
        total = total + PROXIMAL * jnp.linalg.solve(hessian(p, support), by_query) / 2
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


def test_recurring_tasks_go_on_where_they_were_and_fresh_ones_start_anew():
    z, x = start(4)
    problem = task.make_problem(apply, jnp.asarray(PIXELS), PROXIMAL)
    solver = solvers.tracked(problem, **SGD)
    update = jax.jit(solver.update)
    once, _ = update(solver.init(z, x), bf.Batch(BATCH, BATCH))
    twice, _ = update(once, bf.Batch(BATCH, BATCH))
    for state in (once, twice):
        moved = np.any(state.inner_params["w"] != 0, (1, 2))
        assert moved.tolist() == [True, False, True, False]
    assert np.any(twice.inner_params["w"][0] != once.inner_params["w"][0])

    fresh = solvers.imaml(problem, **SGD, inner_steps=2, adjoint_steps=1)
    state = fresh.init(*start(2))
    other = state.replace(inner_params=jax.tree.map(lambda leaf: leaf + 3, state.inner_params))
    update = jax.jit(fresh.update)
    ends = [update(s, bf.Batch(BATCH, BATCH))[0].inner_params for s in (state, other)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_the_network_is_one_of_strided_convolutions():
    params = model.init(jax.random.PRNGKey(0), 3, 5)
    images = jax.random.uniform(jax.random.PRNGKey(1), (2, 28, 28))
    assert model.apply(params, images).shape == (2, 5)
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
    characters = omniglot.read(archive(tmp_path))
    assert characters.images.shape == (5, 3, 28, 28)
    assert omniglot.with_turns(characters).images.shape == (20, 3, 28, 28)
    found = omniglot.draw(characters, ["Two"], "key", ways=3, shots=1, queries=2, count=20, seed=0)
    drawings = np.concatenate([found.support, found.query], -1)
    assert all(len(set(one.ravel())) == 9 for one in drawings)
    assert (drawings // 3 >= 2).all() and (drawings // 3 == drawings[..., :1] // 3).all()


DRAW = {"ways": 2, "shots": 1, "queries": 2, "count": 1, "seed": 0}
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
    tasks = [draw(**DRAW), draw(**DRAW | {"ways": 3})]
    with pytest.raises(UserError, match=r"tasks\[1\] has 3 ways, .*, tasks\[0\] 2 ways"):
        omniglot.stack(tasks)
    assert omniglot.stack(tasks[:1] * 2).support.shape == (2, 2, 1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ([], "--config.data.manual_dir is missing"),
        (["data.manual_dir=/nowhere"], "--config.data.manual_dir=/nowhere holds no images_"),
        (["proximal=0.0"], "--config.proximal=0.0"),
        (["tasks=10"], "--config.tasks=10: not a multiple"),
    ],
)
def test_a_mistake_in_the_config_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        task.make_task(configs.load(str(CONFIG), settings))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["imaml", "tracked", "maml"])
def test_an_initialisation_is_learned(solver, data_dir, tmp_path):
    settings = [f"data.manual_dir={data_dir / 'omniglot'}", "steps=200", "eval_every=200"]
    settings += ["evaluated=100", "baselines=False"]
    config = configs.load(f"{CONFIG}:{solver}", settings)
    assert experiment.train_and_evaluate(config, tmp_path)["test_accuracy"] > 0.5
