"""The penalty method: its limit, its bias in 1/λ, and that nothing is differentiated twice."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax.solvers.first_order import estimator

X, TARGET = np.array([0.5, 1.5, 3.0]), np.array([1.0, 0.0, 2.0])


def inner_loss(z, x, batch):
    """z* = log x, with a third derivative."""
    del batch
    return jnp.sum(jnp.exp(z) - x * z)


def outer_loss(z, x, batch):
    del x, batch
    return 0.5 * jnp.sum((z - TARGET) ** 2)


HYPERGRADIENT = (np.log(X) - TARGET) / X


def penalised(penalty: float):
    """y of λ(e^y - x) + y - target = 0, by Newton's method."""
    y = np.log(X)
    for _ in range(50):
        y -= (penalty * (np.exp(y) - X) + y - TARGET) / (penalty * np.exp(y) + 1)
    return y


def evaluated(problem, penalty, point, batch=None):
    run = functools.partial(oracles.evaluate_by_penalty, problem, penalty=penalty)
    return jax.jit(run)(point, bf.Batch(batch, batch)).oracles


def test_the_bias_falls_as_one_over_the_penalty(x64):
    problem, errors = bf.Problem(inner_loss, outer_loss), []
    for penalty in (1e2, 1e3, 1e4):
        z = np.log(X)
        point = bf.Variables(z, penalty * (penalised(penalty) - z), jnp.asarray(X))
        d_z, d_v, d_x = oracles.directions(evaluated(problem, penalty, point))
        np.testing.assert_allclose(d_z, 0.0, atol=1e-13)
        np.testing.assert_allclose(d_v, 0.0, atol=1e-9)
        np.testing.assert_allclose(d_x, penalty * (z - penalised(penalty)), rtol=1e-9)
        errors.append(np.abs(d_x - HYPERGRADIENT))
    rates = -np.diff(np.log10(errors), axis=0)
    np.testing.assert_allclose(rates, 1.0, atol=0.02)
    assert np.max(errors[-1]) < 2e-3


def test_the_penalty_that_follows_v_is_near_the_limit():
    point = bf.Variables(
        *(jnp.asarray(a, jnp.float32) for a in (np.log(X), -(np.log(X) - TARGET) / X, X))
    )
    _, d_v, d_x = oracles.directions(evaluated(bf.Problem(inner_loss, outer_loss), None, point))
    # About √eps = 3.5e-4 of Hv: here |Hv| is about 2.
    np.testing.assert_allclose(d_v, 0.0, atol=4e-3)
    np.testing.assert_allclose(d_x, HYPERGRADIENT, rtol=4e-3)
    scaled = point._replace(adjoint=1e6 * point.adjoint)
    hvp = evaluated(bf.Problem(inner_loss, outer_loss), None, scaled).hvp
    np.testing.assert_allclose(hvp, 1e6 * point.adjoint * X, rtol=4e-3)


@pytest.mark.parametrize("penalty", [20.0, 1e4])
def test_v_leaves_zero_under_a_penalty_that_is_given(penalty):
    """V starts so small that v / λ is lost beside z in float32, and Hv with it."""
    problem = bf.Problem(inner_loss, outer_loss)
    solver = bf.first_order(problem, inner=optax.adam(0.05), steps=100, penalty=penalty)
    state, update = solver.init(jnp.ones(3), jnp.asarray(X, jnp.float32)), jax.jit(solver.update)
    for _ in range(3):
        state, _ = update(state, bf.Batch(jnp.zeros(1), jnp.zeros(1)))
    assert jnp.linalg.norm(state.adjoint) > 1e-3


def test_products_with_a_v_of_zero_are_zero_and_v_leaves_it():
    """Two gradients at one point are rounded in two ways, and noise is no curvature."""
    a = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    fit = lambda z, target: jnp.mean((jnp.tanh(a @ z) - target) ** 2)
    problem = bf.Problem(
        lambda z, x, batch: fit(z, 1.0) + jnp.exp(x) * jnp.sum(z**2),
        lambda z, x, batch: fit(z, 0.5),
    )
    z, batch = jnp.asarray(np.random.default_rng(2).normal(size=3), jnp.float32), jnp.zeros(1)
    point = bf.Variables(z, jnp.zeros(3), jnp.float32(0.2))
    by_differences = dataclasses.replace(problem, derivatives="finite_differences")
    for found in (
        evaluated(problem, None, point, batch),
        jax.jit(functools.partial(oracles.evaluate, by_differences))(point, bf.Batch(batch, batch)),
    ):
        assert not found.hvp.any() and not found.cross_jvp.any()
    solver = bf.first_order(problem, inner=optax.adam(0.02), steps=100)
    state, update = solver.init(z, jnp.float32(0.2)), jax.jit(solver.update)
    for _ in range(3):
        state, _ = update(state, bf.Batch(batch, batch))
    assert jnp.linalg.norm(state.adjoint) > 1e-3

    optimiser = bf.adjoint.self_damped(bf.adjoint.in_own_units(optax.adam(0.1)))
    v, moving = jnp.zeros(3), optimiser.init(jnp.zeros(3))
    for _ in range(3):  # H = I, ∇₁F = 1; at v = 0 rounding alone
        product = jnp.where(v.any(), jnp.linalg.norm(v), 1e-7)
        step, moving = optimiser.update(
            v + 1.0, moving, v, adjoint_product=product, adjoint_residual=jnp.float32(1.0)
        )
        v = v + step
    assert jnp.linalg.norm(v) > 1e-3
    np.testing.assert_allclose(moving.unit, 1.0, rtol=1e-5)


def test_settings_of_auto_without_a_meaning_here_are_refused():
    problem = bf.Problem(inner_loss, outer_loss)
    bf.first_order(problem, inner=optax.sgd(0.1), steps=10, subsample=1.0, estimator=None)
    with pytest.raises(ValueError, match="^subsample= has no meaning for first_order.*bf.auto$"):
        bf.first_order(problem, inner=optax.sgd(0.1), steps=10, subsample=0.5)
    with pytest.raises(ValueError, match="^estimator= has no meaning for first_order"):
        bf.first_order(problem, inner=optax.sgd(0.1), steps=10, estimator=estimator())


RNG = np.random.default_rng(0)
ROWS = {
    "a": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32),
    "y": jnp.asarray(RNG.normal(size=6), jnp.float32),
    "index": jnp.array([7, 1, 3, 0, 4, 2]),
    "domain": jnp.array([0, 1, 2, 2, 1, 0]),
}


def weighted(z, x, batch):
    weights = jax.nn.sigmoid(x["rows"]) * jax.nn.softmax(x["domains"])[batch["domain"]]
    return jnp.mean(weights * (jnp.tanh(batch["a"] @ z) - batch["y"]) ** 2)


def unweighted(z, x, batch):
    del x
    return jnp.mean((jnp.tanh(batch["a"] @ z) - batch["y"]) ** 2)


WEIGHTED = bf.Problem(weighted, unweighted, per_sample={"rows": True, "domains": False})
POINT = bf.Variables(
    jnp.array([0.3, -0.5, 1.0]),
    jnp.array([1.0, 2.0, -1.0]),
    {"rows": jnp.linspace(-1, 1, 9), "domains": jnp.array([0.1, 0.2, -0.3])},
)


def test_weights_of_examples_and_of_domains_follow_soba_on_one_device_and_on_two():
    exact = jax.jit(functools.partial(oracles.evaluate, WEIGHTED))(POINT, bf.Batch(ROWS, ROWS))
    ours = evaluated(WEIGHTED, None, POINT, ROWS)
    assert isinstance(ours.cross_jvp["rows"], bf.Rows)
    for one, other in zip(*map(jax.tree.leaves, (ours, exact)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0.01, atol=1e-3)

    mesh = bf.sharding.make_mesh("data=2", jax.devices()[:2])
    shared = bf.sharding.data_parallel(WEIGHTED, mesh)
    states = []
    for problem in (WEIGHTED, shared):
        solver = bf.first_order(problem, inner=optax.sgd(0.1), steps=10, damping=0.0)
        state = solver.init(POINT.inner, POINT.outer).replace(adjoint=POINT.adjoint)
        states.append(jax.jit(solver.update)(state, bf.Batch(ROWS, ROWS))[0])
    for one, other in zip(*(ravel_pytree(s.variables)[0] for s in states), strict=True):
        # λ is the same on every device; what differs is the order of sums, times λ.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4)


def test_an_opaque_kernel_trains_and_bad_penalties_are_refused():
    @jax.custom_vjp
    def kernel(z):
        return jax.pure_callback(np.cosh, z, z)

    kernel.defvjp(lambda z: (kernel(z), z), lambda z, c: (c * jax.pure_callback(np.sinh, z, z),))
    problem = bf.Problem(
        lambda z, x, b: jnp.sum(kernel(z - x)), lambda z, x, b: 0.5 * jnp.sum((z - 2.0) ** 2)
    )
    batch, z, x = bf.Batch(jnp.zeros(1), jnp.zeros(1)), jnp.zeros(2), jnp.zeros(2)
    found = oracles.probe(problem, bf.Variables(z, z, x), batch)
    assert found.stopped_by["first_order"] == "" != found.stopped_by["forward_over_reverse"]
    with pytest.raises(TypeError, match="bf.first_order"):
        bf.auto(problem, inner=optax.sgd(0.3), steps=10).update(
            bf.auto(problem, inner=optax.sgd(0.3), steps=10).init(z, x), batch
        )
    solver = bf.single_loop(problem, estimator(), inner=optax.sgd(0.3), outer=optax.sgd(0.1))
    update, state = jax.jit(solver.update), solver.init(z, x)
    for _ in range(150):
        state, info = update(state, batch)
    np.testing.assert_allclose(state.outer_params, 2.0, atol=0.01)
    assert float(info.oracle_units) == 3.0
    with pytest.raises(ValueError, match=r"penalty=1e\+09 is out of reach"):
        never = bf.first_order(problem, inner=optax.sgd(0.3), steps=10, penalty=1e9)
        never.update(never.init(z, x), batch)
    with pytest.raises(ValueError, match="penalty must be a positive number"):
        bf.first_order(problem, inner=optax.sgd(0.3), steps=10, penalty=-1.0)
