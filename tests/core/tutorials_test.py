"""Flax's own introductory loops, linen and NNX, with a weight for each example learned in them.

The networks are small, but hold what the tutorials' networks hold: BatchNorm, dropout whose keys
come with the call, losses that return their logits beside the value.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import bilevel_flax as bf

N, BATCH, CLASSES = 24, 8, 3
rng = np.random.default_rng(0)
TRAIN = {
    "image": rng.normal(size=(N, 6)).astype(np.float32),
    "label": rng.integers(0, CLASSES, N),
    "index": np.arange(N),
}
weights = bf.outer.sigmoid(N)


def minibatches():
    for start in range(0, N, BATCH):
        yield jax.tree.map(lambda leaf, at=start: jnp.asarray(leaf[at : at + BATCH]), TRAIN)


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


class Network(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.4)
        self.last = nnx.Linear(5, CLASSES, rngs=rngs)

    def __call__(self, x, rngs: nnx.Rngs | None = None):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x))), rngs=rngs))


def test_the_nnx_loop():
    def inner_loss(model, x, batch, rngs):
        logits = model(batch["image"], rngs)
        return (weights.apply(x, batch) * cross_entropy(logits, batch)).mean(), logits

    def outer_loss(model, x, batch, rngs):
        logits = model(batch["image"], rngs)
        return cross_entropy(logits, batch).mean(), logits

    model = Network(rngs=nnx.Rngs(0))
    problem = bf.nnx.problem(
        inner_loss, outer_loss, model, weights.init(), has_aux=True, per_sample=True
    )
    solver = bf.auto(problem, inner=optax.adamw(5e-3), steps=6)
    optimizer = bf.nnx.Optimizer(model, solver, weights.init(), rng=jax.random.key(3))
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    before = jax.tree.map(np.array, nnx.state(model))

    @nnx.jit
    def train_step(model, optimizer, metrics, batch):
        info = optimizer.update(model, bf.Batch(batch, batch))
        logits = info.metrics["inner_aux"]
        metrics.update(loss=info.inner_loss, logits=logits, labels=batch["label"])
        return info

    for _ in range(2):
        for batch in minibatches():
            info = train_step(model, optimizer, metrics, batch)
            assert bool(info.ok) and bool(info.finite)
            assert info.metrics["outer_aux"].shape == (BATCH, CLASSES)
    assert 0 <= float(metrics.compute()["accuracy"]) <= 1
    after = nnx.state(model)
    for name in ("first", "norm", "last"):
        for path, leaf in nnx.to_flat_state(after[name]):
            assert (leaf[...] != dict(nnx.to_flat_state(before[name]))[path][...]).any(), path
    assert (np.asarray(optimizer.outer) != np.asarray(weights.init())).mean() > 0.5


class DropoutAlone(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.last = nnx.Linear(6, CLASSES, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(x))


class Recurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.SimpleCell(1, 4, rngs=rngs), rngs=rngs)
        self.last = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.rnn(x[:, :, None])[:, -1])


class Plain(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.last = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(x)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("network", [DropoutAlone, Recurrent, Plain])
def test_every_module_takes_a_step(network, has_aux):
    """One that draws has a state without variables; the state that comes back has the same tree."""

    def loss(model, x, batch):
        value = jnp.mean(jnp.exp(x) * cross_entropy(model(batch["image"]), batch))
        return (value, {"shifted": value + 1}) if has_aux else value

    model, x = network(nnx.Rngs(0)), jnp.array(0.0)
    solver = bf.soba(
        bf.nnx.problem(loss, loss, model, x, has_aux=has_aux),
        inner=optax.sgd(0.1),
        outer=optax.sgd(0.1),
    )
    optimizer, batch = bf.nnx.Optimizer(model, solver, x), next(minibatches())
    before = optimizer.state(model)
    shapes, info = jax.eval_shape(solver.update, before, bf.Batch(batch, batch))
    assert jax.tree.structure(shapes) == jax.tree.structure(before)
    assert ("inner_shifted" in info.metrics) == has_aux
    if network is DropoutAlone:
        kernel = np.array(model.last.kernel[...])
        nnx.jit(lambda m, o, b: o.update(m, b))(model, optimizer, bf.Batch(batch, batch))
        assert (np.asarray(model.last.kernel[...]) != kernel).any()


def test_keys_from_outside_the_loss_are_named():
    model, rngs, batch = Network(rngs=nnx.Rngs(0)), nnx.Rngs(1), next(minibatches())

    def loss(model, x, batch):
        return jnp.exp(x) * cross_entropy(model(batch["image"], rngs), batch).mean()

    problem = bf.nnx.problem(loss, loss, model, jnp.array(0.0))
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = bf.nnx.init(solver, model, jnp.array(0.0))
    with pytest.raises(TypeError, match=r"inner_loss\(model, outer, batch, rngs\)") as caught:
        jax.eval_shape(solver.update, state, bf.Batch(batch, batch))
    assert "\n" not in str(caught.value)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x)))
        return nn.Dense(CLASSES)(nn.Dropout(0.4, deterministic=not train)(x))


class TrainState(train_state.TrainState):
    batch_stats: Any


def test_the_linen_loop():
    """The losses are those of the plain loop; its state's parts go into `solver.init`."""
    model, first = LinenNetwork(), next(minibatches())
    variables = model.init(jax.random.key(0), first["image"], train=False)
    plain = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(0.1, momentum=0.9),
        batch_stats=variables["batch_stats"],
    )

    def inner_loss(params, x, batch, model_state, rng):
        logits, model_state = plain.apply_fn(
            {"params": params, **model_state},
            batch["image"],
            train=True,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )
        loss = (weights.apply(x, batch) * cross_entropy(logits, batch)).mean()
        return loss, bf.Aux(model_state, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    def outer_loss(params, x, batch, model_state, rng):
        logits = plain.apply_fn({"params": params, **model_state}, batch["image"], train=False)
        return cross_entropy(logits, batch).mean(), bf.Aux()

    problem = bf.Problem(inner_loss, outer_loss, stateful=True, per_sample=True)
    solver = bf.auto(problem, inner=plain.tx, steps=3)
    state = solver.init(
        plain.params, weights.init(), model_state={"batch_stats": plain.batch_stats}
    )
    train_step = jax.jit(solver.update)
    for batch in minibatches():
        state, info = train_step(state, bf.Batch(batch, batch))
        assert bool(info.ok) and 0 <= float(info.metrics["inner_accuracy"]) <= 1
    plain = plain.replace(params=state.params, **state.model_state)  # on with the plain loop
    logits = plain.apply_fn(
        {"params": plain.params, "batch_stats": plain.batch_stats}, first["image"], train=False
    )
    assert jnp.isfinite(logits).all()
    assert (state.outer_params != weights.init()).mean() > 0.5

    with pytest.raises(ValueError, match=r"pass solver.init\(..., model_state=") as caught:
        forgotten = solver.init(plain.params, weights.init())
        jax.eval_shape(solver.update, forgotten, bf.Batch(first, first))
    assert "\n" not in str(caught.value)
