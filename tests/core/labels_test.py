"""Label rows as x: hypergradients against dense Jacobians, and SABA over all minibatches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import data

N, CLASSES, FEATURES, BATCH = 8, 3, 2, 2


@pytest.fixture(scope="module")
def task():
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    train = {"image": rng.normal(size=(N, FEATURES))}
    clean = {"image": rng.normal(size=(6, FEATURES)), "label": rng.integers(0, CLASSES, 6)}
    soft = bf.outer.labels(rng.integers(0, CLASSES, N), CLASSES, noise=0.3)

    def inner_loss(z, x, batch):
        losses = soft.losses(x["labels"], batch["image"] @ z)
        return jnp.mean(jax.nn.sigmoid(x["weights"]) * losses) + 0.1 * jnp.sum(z**2)

    def outer_loss(z, x, batch):
        logits = batch["image"] @ z
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    problem = bf.Problem(inner_loss, outer_loss, per_sample=True)
    x = {
        "labels": soft.init().astype(jnp.float64) + 0.1 * rng.normal(size=(N, CLASSES)),
        "weights": jnp.asarray(rng.normal(size=N)),
    }
    parts = data.partition(train, BATCH, shuffle=False)
    yield problem, x, parts, clean, {**train, "index": np.arange(N)}
    jax.config.update("jax_enable_x64", False)


def test_directions_are_those_of_dense_jacobians(task):
    problem, x, _, clean, train = task
    z, v = jax.random.normal(jax.random.key(0), (2, FEATURES, CLASSES), jnp.float64)

    @jax.jit
    def run(x):
        gradient = lambda x: jax.grad(lambda z: problem.inner_loss(z, x, train))(z)
        exact = jax.tree.map(
            lambda jacobian: jnp.einsum("ab,ab...->...", v, jacobian), jax.jacobian(gradient)(x)
        )
        point = bf.Variables(z, v, x)
        return bf.oracles.evaluate(problem, point, bf.Batch(train, clean)), exact

    found, exact = run(x)
    for name, rows in found.cross_jvp.items():
        dense = jnp.zeros_like(x[name]).at[rows.index].add(rows.values)
        np.testing.assert_allclose(dense, exact[name], atol=1e-10)


def test_saba_remembers_label_rows(task):
    """Each minibatch visited once, nothing moves: its mean direction is that of all the data."""
    problem, x, parts, clean, train = task
    still = {"inner": optax.sgd(0.0), "adjoint": optax.sgd(0.0), "outer": optax.sgd(0.0)}
    solver = bf.saba(problem, num_inner_batches=N // BATCH, num_outer_batches=1, **still)
    z = jax.random.normal(jax.random.key(1), (FEATURES, CLASSES), jnp.float64)
    state = solver.init(z, x)
    v = jax.random.normal(jax.random.key(2), z.shape, jnp.float64)
    state = state.replace(adjoint=v)
    update = jax.jit(solver.update)
    for i in range(N // BATCH):
        inner = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), parts.batches)
        state, _ = update(state, bf.Batch(inner, clean, jnp.int32(i), jnp.int32(0)))
    # With memories full and nothing moved, one more step's direction of x is the exact one.
    moves = bf.saba(
        problem,
        num_inner_batches=N // BATCH,
        num_outer_batches=1,
        **still | {"outer": optax.sgd(1.0)},
    )
    inner = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), parts.batches)
    new, _ = jax.jit(moves.update)(state, bf.Batch(inner, clean, jnp.int32(0), jnp.int32(0)))
    whole = jax.jit(
        lambda x: bf.oracles.evaluate(problem, bf.Variables(z, v, x), bf.Batch(train, clean))
    )(x)
    for name, rows in whole.cross_jvp.items():
        dense = jnp.zeros_like(x[name]).at[rows.index].add(rows.values)
        np.testing.assert_allclose(x[name] - new.outer_params[name], dense, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0, 3], 3), r"given\[1\] is 3"),
        (([0.0, 1.0], 3), "given must be integers"),
        (([0, 1], 1), "num_classes=1"),
        (([0, 1], 3, 0.0), "noise=0.0"),
    ],
)
def test_mistakes(arguments, words):
    labels, *rest = arguments
    with pytest.raises((ValueError, TypeError), match=words):
        bf.outer.labels(np.array(labels), *rest)
