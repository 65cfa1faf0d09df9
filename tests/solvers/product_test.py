"""Abilities of a problem times those of z's optimiser: each pair takes the plain steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf

N, WIDTH, STEPS = 16, 4, 4
RNG = np.random.default_rng(0)
DATA = {
    "a": jnp.asarray(RNG.normal(size=(8, WIDTH)), jnp.float32),
    "y": jnp.asarray(RNG.normal(size=8), jnp.float32),
    "index": jnp.arange(8, dtype=jnp.int32) * 2,
}
START = {"body": jnp.asarray(RNG.normal(size=(WIDTH, 3)), jnp.float32), "head": jnp.ones(3)}


def network(z, batch):
    return jnp.tanh(batch["a"] @ z["body"]) @ z["head"]


def inner(z, x, batch):
    return jnp.mean(jax.nn.sigmoid(x) * (network(z, batch) - batch["y"]) ** 2)


def outer(z, x, batch):
    return jnp.mean((network(z, batch) - batch["y"] - 0.3) ** 2)


def stateful(loss):
    return lambda z, x, batch, state, rng: (loss(z, x, batch), bf.Aux({"seen": state["seen"] + 1}))


def on_a_mesh(problem):
    mesh = bf.sharding.make_mesh("data=2", jax.devices()[:2])
    return bf.sharding.data_parallel(problem, mesh)


PLAIN = bf.Problem(inner, outer, per_sample=True)
# ability -> (problem, model state, tolerance)
PROBLEMS = {
    "stateful": lambda: (
        bf.Problem(stateful(inner), stateful(outer), per_sample=True, stateful=True),
        {"seen": jnp.int32(0)},
        1e-6,
    ),
    "microbatched": lambda: (bf.oracles.microbatched(PLAIN, 2), None, 1e-5),
    "rematerialised": lambda: (bf.oracles.remat(PLAIN), None, 1e-6),
    "bfloat16": lambda: (bf.oracles.mixed_precision(PLAIN, "bfloat16"), None, 0.05),
    "data parallel": lambda: (on_a_mesh(PLAIN), None, 1e-5),
    "all at once": lambda: (
        on_a_mesh(bf.oracles.microbatched(bf.oracles.mixed_precision(PLAIN, "bfloat16"), 2)),
        None,
        0.05,
    ),
}
OPTIMISERS = {
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "schedule": lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, STEPS), momentum=0.9),
    "multi_transform": lambda: optax.multi_transform(
        {"train": optax.adamw(0.05), "freeze": optax.set_to_zero()},
        {"body": "train", "head": "freeze"},
    ),
}


@functools.cache
def made(optimiser):
    return OPTIMISERS[optimiser]()


def after(problem, model_state, optimiser):
    solver = bf.soba(problem, inner=made(optimiser), outer=bf.outer.lazy_sgd(1.0))
    state = solver.init(START, jnp.zeros(N), model_state=model_state)
    step = jax.jit(solver.update)
    for _ in range(STEPS):
        state, info = step(state, bf.Batch(DATA, DATA))
        assert bool(info.ok)
    return state


@functools.cache
def expected(optimiser):
    return after(PLAIN, None, optimiser)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("ability", PROBLEMS)
def test_every_ability_gives_the_steps_of_the_plain_problem(ability, optimiser):
    problem, model_state, tolerance = PROBLEMS[ability]()
    found, plain = after(problem, model_state, optimiser), expected(optimiser)
    for name in ("inner_params", "adjoint", "outer_params"):
        one, other = getattr(found, name), getattr(plain, name)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            size = max(float(jnp.abs(b).max()), 1e-3)
            assert float(jnp.abs(a - b).max()) <= tolerance * size, name
    assert bool((plain.outer_params != 0).any()) and bool((plain.adjoint["body"] != 0).any())
    if optimiser == "multi_transform":
        assert bool((found.adjoint["head"] == 0).all())
    if ability == "stateful":
        assert int(found.model_state["seen"]) == STEPS
