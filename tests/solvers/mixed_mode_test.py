"""Unrolled differentiation in mixed mode: JAX's own derivatives, closed forms, memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf
from benchmarks import unrolled_memory
from bilevel_flax import contrib, oracles

STEPS = 3
RNG = np.random.default_rng(0)
Z = {"first": RNG.normal(size=(4, 3)), "second": RNG.normal(size=3), "count": np.int32(1)}
X = {"rows": RNG.normal(size=9), "log_decay": np.array(-1.0)}
INNER = {"a": RNG.normal(size=(STEPS, 5, 4)), "index": RNG.permutation(np.arange(15) % 9)}
INNER["index"] = INNER["index"].reshape(STEPS, 5).astype(np.int32)
OUTER = {"a": RNG.normal(size=(1, 6, 4))}


def output(z, batch):
    return jnp.tanh(batch["a"] @ z["first"]) @ z["second"] * z["count"]


def inner_loss(z, x, batch, state, rng):
    del rng
    out = output(z, batch)
    decay = jnp.exp(x["log_decay"]) * (jnp.sum(z["first"] ** 2) + jnp.sum(z["second"] ** 4))
    loss = jnp.mean(jax.nn.sigmoid(x["rows"]) * (out - 1.0 + 0.1 * state["mean"]) ** 2) + decay
    return loss, bf.Aux({"mean": 0.9 * state["mean"] + 0.1 * out.mean()}, {"out": out.mean()})


def outer_loss(z, x, batch, state, rng):
    del x, rng
    out = output(z, batch) - state["mean"]
    return jnp.mean(out**4), bf.Aux({"mean": 2.0 * state["mean"]})


PROBLEM = bf.Problem(
    inner_loss,
    outer_loss,
    stateful=True,
    outer_updates_state=True,
    per_sample={"rows": True, "log_decay": False},
)


def by_jax(inner: optax.GradientTransformationExtraArgs, x):
    """F(z_K(x)), each gradient by `jax.grad`, with the state after the first step."""
    floats = lambda z: {name: z[name] for name in ("first", "second")}
    z, opt_state = floats(jax.tree.map(jnp.asarray, Z)), inner.init(floats(Z))
    state, after = {"mean": jnp.array(0.3)}, None
    for k in range(STEPS):
        batch = jax.tree.map(lambda leaf, k=k: leaf[k], INNER)
        rows = {**x, "rows": x["rows"][batch["index"]]}
        loss = lambda z, b=batch, r=rows: inner_loss(z | {"count": 1}, r, b, state, None)
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(z)
        after = after or aux.model_state
        updates, opt_state = inner.update(grads, opt_state, z, value=value)
        z = optax.apply_updates(z, updates)
    batch = jax.tree.map(lambda leaf: leaf[0], OUTER)
    return outer_loss(z | {"count": 1}, x, batch, after, None)[0]


OPTIMISERS = {
    "adam": optax.adam(0.1),
    # Its step is the loss over the gradient's square: D_x goes through the loss's value, too.
    "polyak": optax.polyak_sgd(max_learning_rate=10.0),
}


@pytest.mark.parametrize("inner", OPTIMISERS)
def test_unrolled_is_jax_grad_of_jax_grad(inner, x64):
    solver = bf.unrolled(PROBLEM, inner=OPTIMISERS[inner], outer=optax.sgd(1.0), inner_steps=STEPS)
    state = solver.init(Z, X, model_state={"mean": jnp.array(0.3)})
    after, _ = jax.jit(solver.update)(state, bf.Batch(INNER, OUTER))
    optimiser = optax.with_extra_args_support(OPTIMISERS[inner])
    expected = jax.jit(jax.grad(functools.partial(by_jax, optimiser)))(state.outer_params)
    for name, leaf in expected.items():
        found = state.outer_params[name] - after.outer_params[name]
        np.testing.assert_allclose(found, leaf, rtol=1e-10, atol=1e-12)


def test_each_mode_and_microbatches_give_the_same_pull_back(x64):
    def loss(z, x, batch):
        return jnp.mean(jnp.tanh(batch @ z) ** 2 * jnp.exp(x))

    z, x, batch, along = (RNG.normal(size=size) for size in (4, (), (6, 4), 4))
    problem = bf.Problem(loss, loss)
    modes = [
        problem,
        bf.Problem(loss, loss, derivatives="reverse_over_reverse"),
        oracles.microbatched(problem, 2),
    ]

    def pulled(problem, gradient):
        of = lambda z, x: gradient(problem, z, x, batch)[1]
        grad, pull = jax.vjp(of, z, x)
        return grad, pull(along)

    expected = jax.jit(lambda: pulled(problem, oracles.inner_value_and_grad))()
    for each in modes:
        found = jax.jit(lambda each=each: pulled(each, oracles.differentiable_inner_grad))()
        for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def d_x(solver, z, x, steps):
    """D_x at x, from a step of 1 along it."""
    state = solver.init(z, x)
    sides = (None, None) if steps is None else (jnp.zeros(steps), jnp.zeros(1))
    batch = bf.Batch(0.0, 0.0) if steps is None else bf.Batch(*sides)
    after = jax.jit(solver.update)(state, batch)[0]
    return jax.tree.map(jnp.subtract, state.outer_params, after.outer_params), after


def test_memory_is_that_of_one_step_in_mixed_mode():
    """Layers rematerialised one by one, 6 steps: the temporaries of the compiled gradients."""

    def loss(z, x, batch):
        layer = jax.checkpoint(lambda h, w: (jnp.tanh(jnp.tanh(h @ w) @ w.T), None))
        return jnp.mean(jax.lax.scan(layer, batch, z)[0] ** 2) * jnp.exp(x)

    z, x, batch = jnp.zeros((8, 16, 16)), jnp.zeros(()), jnp.zeros((6, 256, 16))

    def unrolled(gradient):
        step = lambda z, b, x: (jax.tree.map(lambda a, g: a - 0.1 * g, z, gradient(z, x, b)), None)

        def value(x):
            body = jax.checkpoint(lambda z, b: step(z, b, x), prevent_cse=False)
            return jnp.sum(jax.lax.scan(body, z, batch)[0] ** 2)

        lowered = jax.jit(jax.grad(value)).lower(x)
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
        return compiled.memory_analysis().temp_size_in_bytes

    problem = bf.Problem(loss, loss)
    mixed = lambda z, x, b: oracles.differentiable_inner_grad(problem, z, x, b)[1]
    assert unrolled(mixed) < 0.6 * unrolled(jax.grad(loss))


@pytest.mark.slow
def test_the_benchmark_of_memory():
    found = unrolled_memory.measure(layers=3, width=32, length=32, size=4, steps=4, repeats=0)
    naive, checkpointed, ours = (found[name]["temporary_bytes"] for name in found)
    assert ours < 0.6 * checkpointed < 0.6 * naive
    assert max(each["difference"] for each in found.values()) < 1e-5


CURVES = np.array([0.5, 1.0, 2.0])


def quadratic(z, x, batch):
    del x, batch
    return 0.5 * jnp.sum(CURVES * (z - 1.0) ** 2)


def square(z, x, batch):
    del x, batch
    return 0.5 * jnp.sum((z - 3.0) ** 2)


def heavy_ball(z, x, steps):
    """z_K of SGD with momentum and weight decay, written out."""
    moved = np.zeros(3)
    for _ in range(steps):
        moved = CURVES * (z - 1.0) + x["decay"] * z + x["momentum"] * moved
        z = z - x["rate"] * moved
    return z


def make(x):
    return optax.chain(
        optax.add_decayed_weights(x["decay"]), optax.sgd(x["rate"], momentum=x["momentum"])
    )


def test_rate_decay_and_momentum_are_learned_through_the_optimiser_alone(x64):
    x = {"rate": 0.2, "decay": 0.3, "momentum": 0.5}
    solver = bf.unrolled(
        bf.Problem(quadratic, square),
        inner=bf.outer.learned_optimizer(make, x),
        outer=optax.sgd(1.0),
        inner_steps=4,
    )
    found, after = d_x(solver, jnp.zeros(3), x, 4)
    np.testing.assert_allclose(after.inner_params, heavy_ball(np.zeros(3), x, 4), rtol=1e-12)
    for name in x:
        # The value is a polynomial in each of them: a step into the complex plane is exact.
        slope = np.imag(
            np.sum(0.5 * (heavy_ball(np.zeros(3), x | {name: x[name] + 1e-30j}, 4) - 3.0) ** 2)
        )
        np.testing.assert_allclose(found[name], slope / 1e-30, rtol=1e-12)


def test_maml_and_meta_sgd_learn_where_z_starts_and_how_fast_it_goes(x64):
    x = {"initial": np.array([0.3, -1.0, 2.0]), "rate": np.array([0.1, 0.2, 0.3])}
    by_entry = lambda x: optax.stateless(lambda g, _: jax.tree.map(lambda g: -x["rate"] * g, g))
    solver = bf.unrolled(
        bf.Problem(quadratic, square),
        inner=bf.outer.learned_optimizer(by_entry, x),
        outer=optax.sgd(1.0),
        inner_steps=3,
        initial=lambda x: x["initial"],
    )
    found, after = d_x(solver, jnp.full(3, 7.0), x, 3)
    # z_K - 1 = (1 - x_rate h)^K (x_initial - 1), whatever z was before.
    kept = 1 - x["rate"] * CURVES
    end = 1 + kept**3 * (x["initial"] - 1)
    np.testing.assert_allclose(after.inner_params, end, rtol=1e-12)
    np.testing.assert_allclose(found["initial"], (end - 3) * kept**3, rtol=1e-12)
    by_rate = (end - 3) * (x["initial"] - 1) * 3 * kept**2 * -CURVES
    np.testing.assert_allclose(found["rate"], by_rate, rtol=1e-12)
    other = bf.unrolled(
        bf.Problem(quadratic, square),
        inner=optax.sgd(0.1),
        outer=optax.sgd(1.0),
        inner_steps=3,
        initial=lambda x: x["initial"][:2],
    )
    with pytest.raises(ValueError, match=r"initial\(outer_params\) returned .* inner_params are"):
        d_x(other, jnp.zeros(3), {"initial": jnp.zeros(3)}, 3)
    with pytest.raises(TypeError, match="initial=3 must be a function"):
        bf.unrolled(bf.Problem(quadratic, square), inner=optax.sgd(0.1), initial=3)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_darts2_is_one_step_in_mixed_mode(x64):
    loss = lambda z, x, batch: jnp.sum(jnp.cosh(z - x))
    solver = contrib.darts2(bf.Problem(loss, square), inner=optax.sgd(0.2), outer=optax.sgd(1.0))
    z, x = RNG.normal(size=(2, 3))
    found, _ = d_x(solver, jnp.asarray(z), jnp.asarray(x), None)
    end = z - 0.2 * np.sinh(z - x)
    np.testing.assert_allclose(ravel_pytree(found)[0], (end - 3) * 0.2 * np.cosh(z - x), rtol=1e-12)
