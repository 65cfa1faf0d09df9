"""Microbatches change the memory of a step, not its numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problems import logistic

import bilevel_flax as bf
from bilevel_flax import oracles

SIZE, NUM_INNER, NUM_OUTER = 12, 4, 3


def ragged():
    """40 and 30 samples in minibatches of 12: the last ones hold 4 and 6 real ones."""
    return logistic(num_samples=40, num_outer_samples=30, batch=SIZE)


def split(problem, count):
    return oracles.microbatched(problem, count)


def point(task):
    v = jax.tree.map(lambda leaf: 0.3 + 0.1 * leaf, task.inner_params)
    return bf.Variables(task.inner_params, v, task.outer_params)


# Operation by operation each would be compiled by itself.
evaluate = jax.jit(oracles.evaluate, static_argnums=0)


def close(found, expected, rtol=1e-11):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def pieces_of(problem, at, batch):
    """Every quantity that the oracles have, each way."""
    z, v, x = at
    whole = oracles.evaluate_all(problem, at, batch)
    block = oracles.evaluate_subsample(problem, at, batch, block=jnp.int32(1), parts=2)
    alone = oracles.evaluate_inner(problem, at, batch)

    def unroll(x):
        grad = oracles.inner_grad(problem, z, x, batch.inner)
        return jax.tree.map(lambda a, g: a - 0.3 * g, z, grad), None, ()

    return {
        "whole": whole[:3],
        "block": block[:3],
        "alone": (alone.oracles.inner_grad, alone.inner_loss),
        "one side": oracles.evaluate_all(problem, at, batch._replace(inner=None)).oracles,
        "inner_grad_outer": oracles.inner_grad_outer(problem, z, x, batch.inner),
        "hvp": oracles.hvp(problem, at, batch.inner),
        "cross_jvp": oracles.cross_jvp(problem, at, batch.inner),
        "unrolled": oracles.unrolled_value_and_grad(problem, unroll, x, batch.outer)[:2],
    }


@functools.cache
def compiled(count):
    return jax.jit(functools.partial(pieces_of, split(ragged().problem, count)))


@pytest.mark.parametrize(("i", "j"), [(0, 1), (3, 2)], ids=["full", "ragged"])
def test_the_oracles_are_those_of_the_whole_minibatch(x64, i, j):
    task = ragged()
    at, batch = point(task), task.batch(i, j)
    expected = compiled(1)(at, batch)
    # The second of two blocks has 6 examples, all of them padding where the minibatch is ragged.
    close(compiled(3)(at, batch), expected)
    index = expected["whole"][0].cross_jvp["logits"].index
    real = np.asarray(batch.inner["mask"]) > 0
    np.testing.assert_array_equal(index, np.where(real, batch.inner["index"], task.num_samples))


def test_parts_of_padding_alone_and_losses_that_divide_by_the_mask(x64):
    """0/0 in a part without examples does not spoil the others; only-padding stays finite."""
    loss = lambda z, x, b: jnp.sum(b["mask"] * (b["a"] * z - x) ** 2) / jnp.sum(b["mask"])
    problem = bf.Problem(loss, loss)
    at = bf.Variables(jnp.float64(1.0), jnp.float64(2.0), jnp.float64(3.0))
    side = {"a": jnp.arange(4.0), "mask": jnp.array([1.0, 0.0, 1.0, 0.0])}
    found, expected = (
        evaluate(split(problem, count), at, bf.Batch(side, side)) for count in (2, 1)
    )
    close(found, expected)


COUNTS = {"num_inner_batches": NUM_INNER, "num_outer_batches": NUM_OUTER}
SOLVERS = {
    "soba": bf.soba,
    "saba": functools.partial(bf.saba, **COUNTS),
    "srba": functools.partial(bf.srba, **COUNTS, period=100),
    "amigo": functools.partial(bf.amigo, inner_steps=2, adjoint_steps=2),
}


def run(make, task, problem, steps=4):
    """A full pass where the solver wants one, then `steps` updates; one compiled function."""
    solver = make(
        problem,
        inner=optax.sgd(0.1),
        outer=optax.sgd(0.1),
        inner_weights=task.inner_weights,
        outer_weights=task.outer_weights,
    )
    shape = () if solver.batches == (1, 1) else (-1,)
    ids = {
        side: (np.arange(steps * count) % total).reshape(steps, count).reshape(steps, *shape)
        for side, count, total in zip(COUNTS, solver.batches, (NUM_INNER, NUM_OUTER), strict=True)
    }

    @jax.jit
    def whole():
        state = solver.init(task.inner_params, task.outer_params)
        if solver.refresh_units != (0.0, 0.0):
            for side, total in (("outer", NUM_INNER), ("inner", NUM_OUTER)):
                state, _ = jax.lax.scan(
                    lambda state, k, other=side: (
                        solver.refresh(state, task.batch(k, k)._replace(**{other: None})),
                        None,
                    ),
                    state,
                    np.arange(total),
                )
        return jax.lax.scan(
            lambda state, ids: solver.update(state, task.batch(*ids)),
            state,
            (ids["num_inner_batches"], ids["num_outer_batches"]),
        )

    state, info = whole()
    assert jnp.all(jnp.stack(info.finite))
    return state, info


@pytest.mark.parametrize("name", SOLVERS)
def test_every_kind_of_solver_takes_the_same_steps(x64, name):
    task = ragged()
    make = functools.partial(SOLVERS[name])
    found, expected = (run(make, task, split(task.problem, count)) for count in (3, 1))
    close(found, expected, rtol=1e-9)


def test_a_stateful_loss_sees_the_parts_in_turn():
    """Model state is threaded, keys differ, metrics are means."""

    def loss(z, x, batch, state, rng):
        noise = jax.random.normal(rng, ())
        value = jnp.mean((z - x * batch) ** 2)
        seen = {"seen": state["seen"] + batch.sum(), "parts": state["parts"] + 1}
        return value, bf.Aux(seen, {"noise": noise, "count": batch.size, "square": noise**2})

    problem = bf.Problem(loss, loss, stateful=True, outer_updates_state=True)
    start = {"seen": jnp.float32(0.0), "parts": jnp.int32(0)}
    batch = jnp.arange(8.0)
    at = bf.Variables(jnp.float32(0.5), jnp.float32(1.0), jnp.float32(2.0))
    plain, split_up = (
        evaluate(split(problem, count), at, bf.Batch(batch, batch), start, jax.random.PRNGKey(0))
        for count in (1, 4)
    )
    close(split_up[0], plain[0], rtol=1e-5)
    state, metrics = split_up[1].model_state, split_up[1].metrics
    assert float(state["seen"]) == 2 * 28.0 and int(state["parts"]) == 8
    assert float(metrics["inner_count"]) == 2.0
    variance = float(metrics["inner_square"] - metrics["inner_noise"] ** 2)
    assert variance > 1e-3  # the parts drew different numbers


def test_an_outer_loss_in_evaluation_mode_sees_one_state():
    def inner(z, x, batch, state, rng):
        return jnp.mean((z - x * batch) ** 2), bf.Aux({"mean": state["mean"] + 1.0})

    def outer(z, x, batch, state, rng):
        return jnp.mean((z - state["mean"] * batch) ** 2), bf.Aux()

    problem = bf.Problem(inner, outer, stateful=True)
    at = bf.Variables(jnp.float32(0.5), jnp.float32(1.0), jnp.float32(2.0))
    batch, start = jnp.arange(4.0), {"mean": jnp.float32(3.0)}
    found, expected = (
        evaluate(split(problem, k), at, bf.Batch(batch, batch), start) for k in (2, 1)
    )
    close(found[0], expected[0], rtol=1e-6)
    assert [float(aux.model_state["mean"]) for _, aux in (found, expected)] == [5.0, 4.0]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.out(self.dropout(self.norm(inputs)))[:, 0].astype(jnp.float32)


def test_modules_and_linear_models_take_the_settings():
    both = lambda problem: oracles.microbatched(oracles.mixed_precision(problem, "bfloat16"), 2)
    loss = lambda model, x, batch: jnp.mean((model(batch) - x) ** 2)
    problem = both(bf.nnx.problem(loss, loss, Net(nnx.Rngs(0)), jnp.float32(1.0)))
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = bf.nnx.init(solver, Net(nnx.Rngs(0)), jnp.float32(1.0))
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)) + 2, jnp.float32)
    after, info = jax.jit(solver.update)(state, bf.Batch(batch, batch))
    bf.check_finite(info)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)
    assert shapes(after) == shapes(state)
    # BatchNorm's running mean moved twice, towards one half of the examples and then the other.
    (mean,) = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(after.model_state)
        if "mean" in jax.tree_util.keystr(path)
    ]
    expected = 0.01 * (0.99 * batch[::2].mean(0) + batch[1::2].mean(0))
    np.testing.assert_allclose(mean, expected, rtol=0.01)


def test_what_does_not_divide_is_named():
    task = ragged()
    with pytest.raises(ValueError, match=r"microbatches=5 does not divide.*'index'.*\(12,\)"):
        oracles.evaluate(split(task.problem, 5), point(task), task.batch(0, 0))
    for count in (0, 2.0, True):
        with pytest.raises(ValueError, match="microbatches=.* must be an integer >= 1"):
            split(task.problem, count)
