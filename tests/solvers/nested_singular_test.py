"""Nested methods where a system has no solution, a gradient is 0, or a leaf is no real array."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from nested_behaviour_test import COUNTS, METHODS, d_x_of

import bilevel_flax as bf
from bilevel_flax import contrib
from bilevel_flax.base import Variables
from bilevel_flax.solvers.nested.linear_solves import (
    conjugate_gradients,
    hypergradient,
    neumann,
)
from bilevel_flax.solvers.nested.sampled_oracles import Minibatch, SampledOracles

STILL = {"inner": optax.sgd(0.0), "outer": optax.sgd(1.0), "inner_steps": 1}
SOLVED = {
    "implicit": functools.partial(bf.implicit, **STILL),
    "bsg": functools.partial(contrib.bsg, **STILL),
    "bsgo": functools.partial(contrib.bsgo, **STILL),
}


def untrained_head():
    """G does not see u, F does: 3 is no part of H's range."""
    inner = lambda z, x, _: 0.5 * (z["h"] - x["x"]) ** 2 + 0.5 * z["w"] ** 2
    outer = lambda z, x, _: 0.5 * (z["h"] - 2.0) ** 2 + 3 * z["u"] + 0.5 * z["w"] ** 2 + 2 * z["w"]
    z = {"h": jnp.array(0.5), "u": jnp.array(0.0), "w": jnp.array(0.0)}
    return inner, outer, z, {"x": jnp.array(0.5)}, True


def more_parameters_than_rows():
    rng = np.random.default_rng(0)
    rows, held = jnp.asarray(rng.normal(size=(4, 12))), jnp.asarray(rng.normal(size=(5, 12)))
    inner = lambda z, x, _: 0.5 * jnp.mean(jnp.exp(x) * (rows @ z - 1.0) ** 2)
    outer = lambda z, x, _: 0.5 * jnp.mean((held @ z - 2.0) ** 2)
    return inner, outer, jnp.asarray(rng.normal(size=12)), jnp.zeros(4), True


def saddle():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(5, 5))
    matrix = jnp.asarray(root @ np.diag([-2.0, -0.5, 0.7, 1.0, 3.0]) @ np.linalg.inv(root))
    matrix = (matrix + matrix.T) / 2
    inner = lambda z, x, _: 0.5 * z @ matrix @ z + jnp.sin(x) @ z
    outer = lambda z, x, _: jnp.sum((z - 1.0) ** 2)
    return inner, outer, jnp.asarray(rng.normal(size=5)), jnp.ones(5), False


def dense_direction(inner, outer, z, x):
    """∇₂F - ∇²₂₁G H⁺ ∇₁F, H⁺ the pseudo-inverse."""
    flat_z, to_z = ravel_pytree(z)
    flat_x, to_x = ravel_pytree(x)
    g = lambda z, x: inner(to_z(z), to_x(x), None)
    f = lambda z, x: outer(to_z(z), to_x(x), None)
    hessian, cross, force, partial = jax.jit(
        lambda *at: (
            jax.hessian(g)(*at),
            jax.jacobian(jax.grad(g), 1)(*at),
            *jax.grad(f, (0, 1))(*at),
        )
    )(flat_z, flat_x)
    v = -np.linalg.pinv(hessian) @ force
    return cross.T @ v + partial, to_z(v)


@pytest.mark.parametrize("case", [untrained_head, more_parameters_than_rows, saddle])
@pytest.mark.parametrize("name", SOLVED)
def test_a_system_without_a_solution_gives_the_pseudo_inverse(name, case, x64):
    inner, outer, z, x, singular = case()
    solver = SOLVED[name](bf.Problem(inner, outer))
    state = solver.init(z, x)
    batch = bf.Batch(*(jnp.zeros(k) if solver.batches != (1, 1) else 0.0 for k in solver.batches))
    found, after, info = d_x_of(solver, state, batch)
    expected, v = dense_direction(inner, outer, z, x)
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(ravel_pytree(after.adjoint)[0], ravel_pytree(v)[0], atol=1e-6)
    assert float(info.metrics["adjoint_singular"]) == singular
    assert (float(info.adjoint_residual) > 1e-3) == singular


def at_rest(z, x, _):
    """One coordinate never has a gradient, one starts without."""
    return 0.5 * (z["a"] - x) ** 2 + 0.0 * z["dead"] ** 2


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(0.1),
        optax.adamw(0.1),
        optax.rmsprop(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.nadam(0.1),
    ],
    ids=["adam", "adamw", "rmsprop", "clipped", "nadam"],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_through_roots_of_squares_at_zero(inner, steps, x64):
    problem = bf.Problem(at_rest, lambda z, x, _: 0.5 * (z["a"] - 3.0) ** 2 + z["dead"])
    make = contrib.darts2 if steps == 1 else functools.partial(bf.unrolled, inner_steps=steps)
    solver = make(problem, inner=inner, outer=optax.sgd(1.0))
    z, x = {"a": jnp.array(0.0), "dead": jnp.array(0.0)}, jnp.array(0.5)
    batch = bf.Batch(0.0, 0.0) if steps == 1 else bf.Batch(jnp.zeros(steps), jnp.zeros(1))
    found, after, info = d_x_of(solver, solver.init(z, x), batch)

    def end(x):
        at, opt_state = z, inner.init(z)
        for _ in range(steps):
            updates, opt_state = inner.update(jax.grad(at_rest)(at, x, None), opt_state, at)
            at = optax.apply_updates(at, updates)
        return at

    value = jax.jit(lambda x: 0.5 * (end(x)["a"] - 3.0) ** 2 + end(x)["dead"])
    expected = (value(x + 1e-5) - value(x - 1e-5)) / 2e-5
    assert float(found) == pytest.approx(float(expected), rel=1e-5, abs=1e-8)
    assert bool(info.ok)
    for name, leaf in end(x).items():
        np.testing.assert_allclose(after.inner_params[name], leaf, rtol=1e-14)


def test_x_may_enter_through_the_optimiser_alone(x64):
    """The learning rate is e^x: z_5 = 1 - (1 - 2e^x)^5."""

    def update(updates, state, params=None, *, outer_params, **_):
        return jax.tree.map(lambda g: -jnp.exp(outer_params["rate"]) * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    losses = (lambda z, x, _: (z - 1.0) ** 2, lambda z, x, _: 0.5 * (z - 3.0) ** 2)
    x = {"rate": jnp.log(jnp.array(0.1))}
    solver = bf.unrolled(bf.Problem(*losses), inner=inner, outer=optax.sgd(1.0), inner_steps=5)
    batch = bf.Batch(jnp.zeros(5), jnp.zeros(1))
    found, *_ = d_x_of(solver, solver.init(jnp.array(0.0), x), batch)
    right = jax.grad(lambda x: 0.5 * (1 - (1 - 2 * jnp.exp(x)) ** 5 - 3.0) ** 2)(x["rate"])
    assert float(found["rate"]) == pytest.approx(float(right))
    # What nothing uses is refused as ever, and so is x where D_x does not go through the optimiser.
    other = solver.init(jnp.array(0.0), x | {"unused": jnp.array(0.0)})
    with pytest.raises(ValueError, match=r"never uses outer_params\['unused'\]"):
        solver.update(other, batch)
    solver = bf.amigo(bf.Problem(*losses), inner=inner, outer=optax.sgd(1.0), inner_steps=1)
    state = solver.init(jnp.array(0.0), x)
    with pytest.raises(ValueError, match=r"never uses outer_params\['rate'\]"):
        solver.update(state, bf.Batch(jnp.zeros(12), jnp.zeros(1)))


def test_vrbo_stands_still_until_its_pass_is_done():
    problem = bf.Problem(lambda z, x, b: 0.5 * (z - x - b) ** 2, lambda z, x, b: 0.5 * (z - b) ** 2)
    settings = {"adjoint_steps": 1, "adjoint_step": 0.5, "inner_steps": 1, "period": 3}
    sgd = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1)}
    solver = contrib.vrbo(problem, **sgd, **settings, **COUNTS)
    update, refresh = jax.jit(solver.update), jax.jit(solver.refresh)
    state = solver.init(jnp.array(1.0), jnp.array(2.0))
    batch = bf.Batch(jnp.zeros(3), jnp.zeros(1))
    passes = 0
    while int(solver.next_refresh(state)) <= int(state.step):
        after, info = update(state, batch)
        assert not bool(info.ok) and not bool(info.finite.inner)
        jax.tree.map(np.testing.assert_array_equal, after, state)
        inner = int(solver.refresh_cursor(state)) < COUNTS["num_inner_batches"]
        state = refresh(state, bf.Batch(0.0, None) if inner else bf.Batch(None, 0.0))
        passes += 1
    after, info = update(state, batch)
    assert passes == 4 * 3 + 3 and bool(info.ok)
    assert float(after.inner_params) != 1.0


@pytest.mark.parametrize("name", METHODS)
def test_leaves_that_are_no_floats_stay_as_they_are(name):
    problem = bf.Problem(
        lambda z, x, b: 0.5 * (z["w"] - x["w"] - b) ** 2, lambda z, x, b: 0.5 * (z["w"] - 3.0) ** 2
    )
    solver = METHODS[name](problem, inner=optax.adam(0.1), outer=optax.adam(0.1))
    w, flag = jnp.array(0.0), jnp.array(True)
    state = solver.init({"w": w, "on": flag, "count": 3}, {"w": w, "on": flag})
    batch = bf.Batch(*(0.0 if solver.batches == (1, 1) else jnp.zeros(k) for k in solver.batches))
    after, _ = jax.eval_shape(solver.update, state, batch)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.all(jax.tree.map(same, state, after))


@pytest.mark.parametrize("make", [*METHODS.values(), bf.soba, contrib.darts2])
def test_complex_parameters_are_refused_in_one_line(make):
    problem = bf.Problem(lambda z, x, b: abs(z * x) ** 2, lambda z, x, b: abs(z) ** 2)
    solver = make(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    number, wave = jnp.array(1.0), {"wave": jnp.array(1j)}
    with pytest.raises(TypeError, match=r"inner_params\['wave'\] is complex64.*two leaves"):
        solver.init(wave, number)
    with pytest.raises(TypeError, match=r"outer_params\['wave'\] is complex64"):
        solver.init(number, wave)


def test_leaves_that_never_move_are_no_part_of_the_system(x64):
    """h* = x and b is held at 0, although G and F are far from separable in it."""
    problem = bf.Problem(
        lambda z, x, _: 0.5 * z["h"] ** 2 - x * z["h"] + 3 * z["b"] * z["h"] + 9 * z["b"] ** 2,
        lambda z, x, _: 0.5 * (z["h"] - 2.0) ** 2 + 0.5 * x**2 + 5 * z["b"],
    )
    z, x = {"h": jnp.array(0.5), "b": jnp.array(0.0)}, jnp.array(0.5)
    one = Minibatch(0.0, None, None)
    optimisers = Variables(None, None, None)
    sampled = SampledOracles(problem, optimisers, None, {"h": True, "b": False})
    for solve in (conjugate_gradients(4, 0.0), neumann(0.5, 60)):
        estimate = hypergradient(sampled, z, x, one, one, one, solve)
        assert float(estimate.d_x) == pytest.approx(0.5 - 2 + 0.5)  # h - 2 + x
        assert float(estimate.adjoint["b"]) == 0 == float(estimate.hvp["b"])
