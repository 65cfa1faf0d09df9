"""Meta-Weight-Net: the loss is a number to it, and it learns to tell wrong labels by it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf

NET = bf.outer.meta_weight_net(hidden=16)


def per_sample(z, batch):
    return jnp.log1p(jnp.exp(-batch["label"] * (batch["image"] @ z)))


def weighted(z, x, batch):
    losses = per_sample(z, batch)
    return jnp.mean(NET.apply(x, batch, losses) * losses)


PROBLEM = bf.Problem(weighted, lambda z, x, batch: jnp.mean(per_sample(z, batch)))


def data(n, wrong, seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, 4)) + 0.0
    label = np.sign(image @ np.array([1.0, -2.0, 0.5, 1.0]))
    flipped = rng.uniform(size=n) < wrong
    return {"image": image, "label": np.where(flipped, -label, label)}, flipped


def test_it_starts_with_equal_weights():
    losses = jnp.array([0.0, 0.3, 7.0])
    np.testing.assert_allclose(NET.apply(NET.init(), {}, losses), 0.5)
    low = bf.outer.meta_weight_net(init=-2.0)
    np.testing.assert_allclose(low.weights(low.init(), losses), jax.nn.sigmoid(-2.0), rtol=1e-6)


def test_neither_z_nor_v_sees_through_the_weights():
    batch, _ = data(8, 0.3, 0)
    x = jax.tree.map(lambda leaf: leaf + 0.3, NET.init())
    point = bf.Variables(jnp.ones(4), jnp.arange(4.0), x)

    @jax.jit
    def run(point):
        z, v, x = point
        w = NET.weights(x, per_sample(z, batch))
        fixed = lambda z: jnp.mean(w * per_sample(z, batch))
        found = bf.oracles.evaluate(PROBLEM, point, bf.Batch(batch, batch))
        return found, *jax.jvp(jax.grad(fixed), (z,), (v,))

    found, gradient, product = run(point)
    np.testing.assert_allclose(found.inner_grad, gradient, rtol=1e-5)
    np.testing.assert_allclose(found.hvp, product, rtol=1e-5)
    assert float(jnp.abs(found.cross_jvp["first"]["kernel"]).max()) > 0


def test_it_learns_to_distrust_large_losses():
    train, wrong = data(256, 0.3, 1)
    held, _ = data(128, 0.0, 2)
    inner, outer = bf.data.partition(train, 32, seed=0), bf.data.partition(held, 32, seed=0)
    steps = 400
    solver = bf.auto(PROBLEM, inner=optax.adam(0.05), steps=steps)
    state = solver.init(jnp.zeros(4), NET.init())

    def body(state, t):
        pick = [
            jax.tree.map(lambda leaf, i=t % parts.num_batches: jnp.asarray(leaf)[i], parts.batches)
            for parts in (inner, outer)
        ]
        return solver.update(state, bf.Batch(*pick))

    state, info = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(steps)))(state)
    assert bool(info.finite.outer.all())
    weights = NET.weights(state.outer_params, per_sample(state.inner_params, train))
    assert float(weights[wrong].mean()) < 0.5 * float(weights[~wrong].mean())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="hidden must be an integer >= 1, got 0"):
        bf.outer.meta_weight_net(hidden=0)
    with pytest.raises(ValueError, match="weighs by the loss"):
        NET.apply(NET.init(), {})
