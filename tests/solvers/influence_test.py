"""Influence against the exact implicit value, and against leaving out and training again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_flax as bf
from bilevel_flax.diagnostics import influence

RIDGE = 0.05


def losses(params, batch):
    return jax.nn.softplus(-batch["y"] * (batch["x"] @ params["w"] + params["b"]))


def penalty(params):
    return RIDGE * (jnp.sum(params["w"] ** 2) + params["b"] ** 2)


def made(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    y = np.sign(x @ np.array([1.0, -2.0, 0.5, 0.0]) + rng.normal(size=n))
    return {"x": x, "y": y}


@pytest.fixture(scope="module")
def fitted():
    jax.config.update("jax_enable_x64", True)
    train, clean = made(64, 0), made(32, 1)
    weights = jnp.ones(64)

    def objective(flat, weights):
        params = {"w": flat[:4], "b": flat[4]}
        return jnp.mean(weights * losses(params, train)) + penalty(params)

    @jax.jit
    def solved(weights, count):
        def newton(_, flat):
            at = jax.grad(objective)(flat, weights)
            return flat - jnp.linalg.solve(jax.hessian(objective)(flat, weights), at)

        # `weights` of the others are raised so that their mean is over one example less.
        return jax.lax.fori_loop(0, count, newton, jnp.zeros(5))

    flat = solved(weights, 12)
    yield train, clean, objective, solved, flat
    jax.config.update("jax_enable_x64", False)


def test_it_is_the_implicit_value(fitted):
    train, clean, objective, _, flat = fitted
    params = {"w": flat[:4], "b": flat[4]}

    @jax.jit
    def minus_change(flat, weights):  # minus dF/dw
        hessian = jax.hessian(objective)(flat, weights)
        cross = jax.jacobian(jax.grad(objective), argnums=1)(flat, weights)
        outer = jax.grad(lambda flat: losses({"w": flat[:4], "b": flat[4]}, clean).mean())(flat)
        return outer @ jnp.linalg.solve(hessian, cross)

    exact = minus_change(flat, jnp.ones(64))
    for method, batch_size in (("dense", 64), ("minres", 16)):
        found = influence(
            losses, params, train, clean, penalty=penalty, method=method, batch_size=batch_size,
            tolerance=1e-12,
        )  # fmt: skip
        np.testing.assert_allclose(found.change, exact, rtol=1e-8, atol=1e-12)
        assert found.converged


def test_it_ranks_as_leaving_out_does(fitted):
    train, clean, _, solved, flat = fitted
    found = influence(losses, {"w": flat[:4], "b": flat[4]}, train, clean, penalty=penalty)

    @jax.jit
    @jax.vmap
    def loss_with(weights):
        left = solved(weights, 12)
        return losses({"w": left[:4], "b": left[4]}, clean).mean()

    change = np.asarray(loss_with(1.0 - np.eye(64)) - loss_with(np.ones((1, 64))))
    ranks = [np.argsort(np.argsort(values)) for values in (found.change, change)]
    assert np.corrcoef(*ranks)[0, 1] >= 0.99
    assert (np.sign(found.change) == np.sign(change)).mean() > 0.95


def test_mistakes():
    params, data = {"w": jnp.zeros(4), "b": jnp.zeros(())}, made(5, 0)
    with pytest.raises(ValueError, match=r"shape \(\) for 5 examples"):
        influence(lambda p, b: losses(p, b).mean(), params, data, data)
    with pytest.raises(ValueError, match="damping=-1"):
        influence(losses, params, data, data, damping=-1.0)
    with pytest.raises(TypeError, match="arrays must be a dict of arrays, got tuple"):
        influence(losses, params, tuple(data.values()), data)


def test_the_name_is_public():
    assert bf.diagnostics.influence is influence
