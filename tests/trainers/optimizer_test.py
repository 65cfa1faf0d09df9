"""A solver in the place of an optimiser: Flax's TrainState, nnx.Optimizer, any Optax loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import bilevel_flax as bf
from bilevel_flax.trainers import SolverState, pairs, solver_optimizer, train_step
from bilevel_flax.trainers import flax as bilevel_flax_state
from bilevel_flax.trainers import nnx as bilevel_nnx

STEPS = 6


def nats(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean(-1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens, train):
        x = nn.Embed(lm.VOCABULARY, 4)(tokens)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(lm.VOCABULARY)(nn.Dropout(0.1, deterministic=not train)(x))


def inner_loss(z, x, batch, model_state, rng):
    logits, new = Net().apply(
        {"params": z, **model_state},
        batch["tokens"],
        True,
        rngs={"dropout": rng},
        mutable=["batch_stats"],
    )
    losses = lm.MIXTURE.weights(x, batch) * nats(logits, batch["tokens"])
    return losses.mean(), bf.Aux(dict(new))


def outer_loss(z, x, batch, model_state, rng):
    logits = Net().apply({"params": z, **model_state}, batch["tokens"], False)
    return nats(logits, batch["tokens"]).mean(), bf.Aux()


def batches():
    for _, pair in zip(range(STEPS), pairs(*lm.streams()), strict=False):
        yield bf.Batch(pair["inner"], pair["outer"])


def close(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, found, expected)


def test_a_train_state_with_batch_norm_and_dropout():
    problem = bf.Problem(inner_loss, outer_loss, stateful=True)
    solver = bf.auto(problem, inner=optax.adam(0.02), steps=STEPS)
    variables = Net().init(jax.random.key(0), jnp.zeros((1, lm.LENGTH), jnp.int32), False)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    rng = jax.random.PRNGKey(7)

    expected = solver.init(params, lm.MIXTURE.init(), model_state=stats, rng=rng)
    tx = solver_optimizer(solver, lm.MIXTURE.init(), rng=rng)
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=tx)
    step, update = jax.jit(bilevel_flax_state.apply_batch), jax.jit(solver.update)
    for batch in batches():
        state, stats, info = step(state, batch, stats)
        expected, other = update(expected, batch)
    close(state.params, expected.inner_params)
    close(stats, expected.model_state)
    for name in SolverState._fields:
        close(getattr(state.opt_state, name), getattr(expected, name))
    close(info, other)
    assert int(state.step) == STEPS
    with pytest.raises(TypeError, match=r"state\.tx is a GradientTransformation.*, no solver"):
        bilevel_flax_state.apply_batch(
            TrainState.create(apply_fn=None, params=params, tx=optax.sgd(1.0)), batch
        )


class Small(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(lm.VOCABULARY, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.LoRA(
            4, 2, lm.VOCABULARY, base_module=nnx.Linear(4, lm.VOCABULARY, rngs=rngs), rngs=rngs
        )

    def __call__(self, tokens):
        return self.out(self.norm(self.embed(tokens)))


def module_losses(model, x, batch):
    return nats(model(batch["tokens"]), batch["tokens"])


def test_an_nnx_optimizer_that_trains_adapters_alone():
    model = Small(nnx.Rngs(0))
    x = lm.MIXTURE.init()
    problem = bf.nnx.problem(
        lambda m, x, b: (lm.MIXTURE.weights(x, b) * module_losses(m, x, b)).mean(),
        lambda m, x, b: module_losses(m, x, b).mean(),
        model,
        x,
        wrt=nnx.LoRAParam,
    )
    solver = bf.soba(problem, inner=optax.adam(0.05), outer=optax.sgd(0.5))
    expected = bf.nnx.init(solver, model, x, wrt=nnx.LoRAParam)
    optimizer = nnx.Optimizer(model, solver_optimizer(solver, x), wrt=nnx.LoRAParam)
    before = nnx.to_flat_state(nnx.state(model.embed))
    step, update = nnx.jit(bilevel_nnx.update), jax.jit(solver.update)
    for batch in batches():
        info = step(model, optimizer, batch)
        expected, other = update(expected, batch)
    close(bf.nnx.params(model, wrt=nnx.LoRAParam), expected.inner_params)
    close(float(info.inner_loss), float(other.inner_loss))
    np.testing.assert_allclose(
        optimizer.opt_state.outer_params[...], expected.outer_params, rtol=1e-5
    )
    # v and the moments are variables in z's tree, as Optax's own are.
    assert isinstance(optimizer.opt_state.adjoint, nnx.State)
    adjoint = nnx.as_pure(optimizer.opt_state.adjoint)
    close(bf.nnx.modules.plain(adjoint), expected.adjoint)
    assert int(optimizer.step[...]) == STEPS
    assert np.abs(model.norm.mean[...]).max() > 0  # BatchNorm has moved, what is frozen has not
    for (path, leaf), (_, now) in zip(
        before, nnx.to_flat_state(nnx.state(model.embed)), strict=True
    ):
        np.testing.assert_array_equal(leaf[...], now[...], err_msg=str(path))
    with pytest.raises(TypeError, match="optimizer.tx is a GradientTransformation"):
        bilevel_nnx.update(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), batch)


def test_update_is_the_difference_that_z_makes():
    problem = bf.Problem(lambda z, x, b: (z["w"] - x) ** 2, lambda z, x, b: (z["w"] - b) ** 2)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    tx = solver_optimizer(solver, jnp.float32(2.0))
    z = {"w": jnp.float32(1.0), "seen": jnp.int32(3)}
    opt_state = tx.init(z)
    batch = bf.Batch(0.0, 5.0)
    updates, after = tx.update(z, opt_state, z, batch=batch)
    moved, held, model_state, info = train_step(solver, z, opt_state, batch)
    close(optax.apply_updates(z, updates), moved)
    close(after, held)
    assert model_state is None
    assert info.ok
    with pytest.raises(TypeError, match=r"needs params and batch=bf\.Batch"):
        tx.update(z, opt_state, z)


def test_the_shorter_stream_starts_anew():
    found = [pair["outer"] for pair in pairs(range(5), lambda: iter("ab"))]
    assert found == ["a", "b", "a", "b", "a"]
    with pytest.raises(ValueError, match="the outer stream ended before the inner one"):
        list(pairs(range(3), "ab"))
    with pytest.raises(ValueError, match="the outer stream ended"):
        list(pairs(range(3), lambda: ""))
