"""First- and second-order DARTS as solvers: their directions by hand, and their bias."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratics

import bilevel_flax as bf
from bilevel_flax import contrib

RATE = 0.2


def step_of(solver, data, start):
    """x's direction in one update on minibatches (1, 2): the outer step is SGD of rate 1."""
    state = solver.init(start.inner, start.outer)
    after, info = jax.jit(solver.update)(state, data.batch(1, 2))
    direction = jax.tree.map(jnp.subtract, state.outer_params, after.outer_params)
    return direction, after, info


def losses_at(data, start):
    batch = data.batch(1, 2)
    inner = jax.jit(lambda z, x: data.problem.inner_loss(z, x, batch.inner))
    outer = jax.jit(lambda z, x: data.problem.outer_loss(z, x, batch.outer))
    return inner, outer, start.inner, start.outer


def test_first_order_is_the_partial_gradient(x64):
    data = quadratics()
    start = data.random_variables()
    solver = contrib.darts1(data.problem, inner=optax.sgd(RATE), outer=optax.sgd(1.0))
    direction, after, info = step_of(solver, data, start)
    inner, outer, z, x = losses_at(data, start)
    for name, expected in jax.grad(outer, 1)(z, x).items():
        np.testing.assert_allclose(direction[name], expected, rtol=1e-10)
    for name, slope in jax.grad(inner)(z, x).items():
        np.testing.assert_allclose(after.inner_params[name], z[name] - RATE * slope, rtol=1e-10)
    assert float(info.oracle_units) == 2
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(after.adjoint))


def test_second_order_is_the_gradient_through_one_step(x64):
    data = quadratics()
    start = data.random_variables()
    solver = contrib.darts2(data.problem, inner=optax.sgd(RATE), outer=optax.sgd(1.0))
    direction, after, _ = step_of(solver, data, start)
    inner, outer, z, x = losses_at(data, start)

    def after_one_step(z, x):
        return jax.tree.map(lambda a, b: a - RATE * b, z, jax.grad(inner)(z, x))

    for name, leaf in after_one_step(z, x).items():
        np.testing.assert_allclose(after.inner_params[name], leaf, rtol=1e-10)

    # By differences of F after the step, in every coordinate of x.
    eps = 1e-5
    for name, leaf in x.items():
        expected = np.zeros(leaf.shape)
        for place in np.ndindex(leaf.shape):
            moved = [{**x, name: leaf.at[place].add(sign * eps)} for sign in (1, -1)]
            high, low = (float(outer(after_one_step(z, at), at)) for at in moved)
            expected[place] = (high - low) / (2 * eps)
        np.testing.assert_allclose(direction[name], expected, rtol=1e-6, atol=1e-8)

    # By hand: v = -ρ ∇₁F at the new z, in the directions of a single-loop method.
    moved_z = after_one_step(z, x)
    force, partial = jax.grad(outer, (0, 1))(moved_z, x)
    _, cross = jax.jvp(
        lambda z: jax.grad(inner, 1)(z, x), (z,), (jax.tree.map(lambda g: -RATE * g, force),)
    )
    for name in x:
        np.testing.assert_allclose(direction[name], cross[name] + partial[name], rtol=1e-9)


def test_neither_is_the_hypergradient(x64):
    """The bias is there in the closed form that conformance_test holds the methods to."""
    data = quadratics()
    exact = data.x_star()
    for response in (0.0, 0.3):
        found = data.x_star(response)
        assert max(float(abs(found[name] - exact[name]).max()) for name in exact) > 0.03


def test_first_order_refuses_an_x_that_the_outer_loss_does_not_see():
    problem = bf.Problem(
        inner_loss=lambda z, x, batch: ((z - x["seen"] - x["hidden"]) ** 2).sum(),
        outer_loss=lambda z, x, batch: ((z - x["seen"]) ** 2).sum(),
    )
    solver = contrib.darts1(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(jnp.zeros(2), {"hidden": jnp.zeros(2), "seen": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"outer_loss never uses outer_params\['hidden'\]"):
        jax.eval_shape(solver.update, state, bf.Batch(jnp.zeros(2), jnp.zeros(2)))
