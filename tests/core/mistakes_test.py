"""Mistakes of whoever writes Python: each ends in one line that names argument, value and fix.

A row is (what is done, the error, words that its message has in this order). Nothing is compiled:
a mistake is found when the solver is made, at `init`, or when the step is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from mistakes import assert_one_line

import bilevel_flax as bf
from bilevel_flax import data, oracles, outer
from bilevel_flax.outer import architecture

N, B = 7, 4
SGD = optax.sgd(0.1)
DATA = {"a": jnp.ones((B, 3)), "y": jnp.ones(B), "index": jnp.arange(B)}
Z, X = {"w": jnp.ones(3)}, {"s": jnp.ones(()), "u": jnp.ones(2)}
WEIGHTS = jnp.zeros(N)


def errors_of(z, batch):
    return (batch["a"] @ z["w"] - batch["y"]) ** 2


def inner(z, x, batch):
    return jnp.mean(errors_of(z, batch)) + jnp.sum(x["u"] ** 2) * x["s"] * jnp.sum(z["w"] ** 2)


def outer_loss(z, x, batch):
    return jnp.mean(errors_of(z, batch))


def weighted(z, x, batch):
    return jnp.mean(jax.nn.sigmoid(x) * errors_of(z, batch))


PLAIN = bf.Problem(inner, outer_loss)
ROWS = bf.Problem(weighted, outer_loss, per_sample=True)


def make(method: Callable = bf.soba, problem: bf.Problem = PLAIN, **options) -> Callable:
    return lambda: method(problem, **({"inner": SGD, "outer": SGD} | options))


def step(
    problem: bf.Problem = PLAIN,
    batch: Any = bf.Batch(DATA, DATA),  # noqa: B008  a constant
    x: Any = None,
    z: Any = None,
    method: Callable = bf.soba,
    state: Any = None,
    **options,
) -> Callable:
    """An update, traced only."""

    def run():
        solver = make(method, problem, **options)()
        rows = bool(problem.per_sample)
        start = solver.init(
            Z if z is None else z, (WEIGHTS if rows else X) if x is None else x, model_state=state
        )
        jax.eval_shape(lambda: solver.update(start, batch)[1].inner_loss)

    return run


def losses(inner_loss: Callable, outer_loss: Callable = outer_loss, **options) -> bf.Problem:
    return bf.Problem(inner_loss, outer_loss, **options)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(1)(x))[:, 0]


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(1)(x))[:, 0]


@functools.cache
def variables(network: type[nn.Module]):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return network().init(keys, DATA["a"])


def linen(network: type[nn.Module]) -> Callable:
    def loss(params, x, batch):
        out = network().apply({"params": params}, batch["a"])
        return jnp.mean((out - batch["y"]) ** 2) * jnp.sum(x["u"]) * x["s"]

    return loss


def stateful_loss(z, x, batch, model_state, rng):
    return inner(z, x, batch) + model_state["seen"], bf.Aux(model_state)


def stateful_outer(z, x, batch, model_state, rng):
    return outer_loss(z, x, batch), bf.Aux()


def without(key: str) -> dict:
    return {name: leaf for name, leaf in DATA.items() if name != key}


def with_entry(**entries) -> bf.Batch:
    return bf.Batch(DATA | entries, DATA)


def linear(**options) -> bf.Problem:
    return bf.linear_problem(
        logits=lambda z, batch: batch["a"] @ z["w"],
        inner_losses=options.pop("inner_losses", lambda logits, x, batch: logits * x["s"]),
        outer_losses=lambda logits, x, batch: logits,
        **options,
    )


def nnx_step(
    inner_loss: Callable,
    has_aux: bool = False,
    batch: Any = bf.Batch(DATA, DATA),  # noqa: B008
) -> Callable:
    def run():
        model, x = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.ones(())
        problem = bf.nnx.problem(inner_loss, inner_loss, model, x, has_aux=has_aux)
        optimizer = bf.nnx.Optimizer(model, bf.soba(problem, inner=SGD, outer=SGD), x)
        nnx.eval_shape(lambda m, o: o.update(m, batch).inner_loss, model, optimizer)

    return run


def of_module(model, x, batch):
    return x * jnp.mean(model(batch["a"]) ** 2)


SABA = {"num_inner_batches": 3, "num_outer_batches": 2}
IDS = {"inner_id": 0, "outer_id": 0}
state_of_flax = TrainState.create(apply_fn=lambda p: p, params=Z, tx=SGD)

ROWS_OF_MISTAKES: dict[str, tuple[Callable, type[Exception], str]] = {
    # --- the solver
    "optimiser not called": (make(inner=optax.sgd), TypeError, r"inner=.*sgd.*call it.*inner=sgd"),
    "optimiser is a number": (make(inner=0.1), TypeError, r"inner=0.1 .*inner=optax.sgd\(0.1\)"),
    "outer not called": (make(outer=optax.adam), TypeError, r"outer=.*adam.*outer=adam\("),
    "adjoint is a NumPy number": (
        make(adjoint=np.float32(0.5)),
        TypeError,
        r"adjoint=.*0.5.*adjoint=optax.sgd",
    ),
    "optimiser is a TrainState": (
        make(inner=state_of_flax),
        TypeError,
        r"inner=TrainState.*inner=state.tx",
    ),
    "optimiser is a name": (make(inner="sgd"), TypeError, r"inner='sgd' .*inner=optax.adam"),
    "optimiser is a schedule": (
        make(inner=optax.cosine_decay_schedule(0.1, 10)),
        TypeError,
        r"inner=<function.*a schedule goes into an optimiser",
    ),
    "auto: optimiser not called": (
        make(bf.auto, inner=optax.adamw, outer=None, steps=9),
        TypeError,
        r"inner=.*adamw.*call it",
    ),
    "nested: optimiser not called": (
        make(bf.amigo, inner=optax.sgd),
        TypeError,
        r"inner=.*sgd.*call it",
    ),
    "nested: outer is a number": (make(bf.amigo, outer=1), TypeError, r"outer=1 .*optax.sgd\(1\)"),
    "no number of minibatches": (
        make(bf.saba, num_inner_batches=0, num_outer_batches=2),
        ValueError,
        r"num_inner_batches must be an integer >= 1, got 0",
    ),
    "half a minibatch": (
        make(bf.srba, num_inner_batches=3, num_outer_batches=1.5, period=2),
        ValueError,
        r"num_outer_batches must be an integer >= 1, got 1.5",
    ),
    "weights of another length": (
        make(bf.saba, inner_weights=[0.5, 0.5], **SABA),
        ValueError,
        r"inner_weights has shape \(2,\).*num_inner_batches is 3.*FiniteSum.weights",
    ),
    "weights that sum to N": (
        make(inner_weights=[1.0, 1.0]),
        ValueError,
        r"inner_weights must sum to 1.*got 2",
    ),
    "negative weights": (
        make(outer_weights=[1.5, -0.5]),
        ValueError,
        r"outer_weights must be a vector of positive shares.*FiniteSum.weights",
    ),
    "unknown init_tables": (
        make(bf.saba, init_tables="full", **SABA),
        ValueError,
        r"init_tables='full' .*\"zero\" or \"refresh\"",
    ),
    "tables in float16": (
        make(bf.saba, table_dtype=jnp.float16, **SABA),
        ValueError,
        r"table_dtype=.*float16.*bfloat16",
    ),
    "unknown memory": (
        make(bf.saba, memory="small", **SABA),
        ValueError,
        r"memory='small'.*compact",
    ),
    "compact memory of any problem": (
        make(bf.saba, memory="compact", example_batch=bf.Batch(DATA, DATA), **SABA),
        ValueError,
        r"memory=.*compact.*linear_problem",
    ),
    "steps of auto": (make(bf.auto, steps=0), ValueError, r"steps.*0"),
    "steps of auto, a float": (make(bf.auto, steps=1e4), ValueError, r"steps.*10000.0"),
    "warmup of auto": (make(bf.auto, steps=9, warmup=1.0), ValueError, r"warmup=1.0 .*\[0, 1\)"),
    "row-sparse optimiser, dense direction": (
        make(bf.unrolled, ROWS, outer=outer.lazy_adam(0.1), inner_steps=2),
        ValueError,
        r"outer is a row-sparse optimiser, but unrolled's.*optax.adam",
    ),
    # --- the problem
    "a loss that is none": (lambda: bf.Problem(None, outer_loss), TypeError, r"inner_loss.*None"),
    "unknown derivatives": (
        lambda: losses(inner, derivatives="forward"),
        ValueError,
        r"derivatives='forward' .*forward_over_reverse",
    ),
    "stateful forgotten": (
        step(losses(stateful_loss)),
        TypeError,
        r"inner_loss\(z, x, batch, model_state, rng\).*stateful=True",
    ),
    "stateful too much": (
        step(losses(inner, stateful=True)),
        TypeError,
        r"inner_loss\(z, x, batch\).*leave out stateful=True",
    ),
    "a loss of two arguments": (
        step(losses(lambda z, batch: 0.0)),
        TypeError,
        r"inner_loss\(z, batch\).*inner_loss\(inner_params, outer_params, batch\)",
    ),
    "F of one argument": (
        step(losses(inner, lambda z: 0.0)),
        TypeError,
        r"outer_loss\(z\).*outer_loss\(inner_params, outer_params, batch\)",
    ),
    "per_sample forgotten": (
        step(losses(weighted), x=WEIGHTS),
        ValueError,
        r"inner_loss.*outer_params has 7 rows .*4 examples.*per_sample=True",
    ),
    "per_sample of another tree": (
        step(losses(weighted, per_sample={"weights": True})),
        ValueError,
        r"per_sample=.*not a pytree prefix of outer_params",
    ),
    "per-sample leaf of integers": (
        step(ROWS, x={"n": jnp.arange(N), "f": jnp.ones(N)}),
        ValueError,
        r"per-sample leaf of outer_params must be a float array \[n, ...\].*int32",
    ),
    "per-sample leaf that is a scalar": (
        step(ROWS, x=jnp.ones(())),
        ValueError,
        r"per-sample leaf.*must be a float array \[n, ...\].*\(\)",
    ),
    "F uses a per-sample leaf": (
        step(
            losses(weighted, lambda z, x, batch: outer_loss(z, x, batch) + x.sum(), per_sample=True)
        ),
        ValueError,
        r"outer_loss.*per-sample leaf",
    ),
    "a loss for each example": (
        step(losses(lambda z, x, batch: errors_of(z, batch) * x["s"] * x["u"].sum())),
        TypeError,
        r"inner_loss must return a real scalar, got shape \(4,\).*mean",
    ),
    "an integer loss": (
        step(losses(lambda z, x, batch: jnp.int32(3))),
        TypeError,
        r"inner_loss must return a real scalar.*int32",
    ),
    "F returns a tuple": (
        step(losses(inner, lambda z, x, batch: (outer_loss(z, x, batch), {}))),
        TypeError,
        r"outer_loss returned a tuple.*stateful=True",
    ),
    "no Aux": (
        step(losses(lambda *a: inner(*a[:3]), lambda *a: outer_loss(*a[:3]), stateful=True)),
        TypeError,
        r"inner_loss of a stateful Problem must return \(loss, .*Aux",
    ),
    "x is not used": (
        step(losses(outer_loss)),
        ValueError,
        r"inner_loss never uses outer_params\['s'\].*use it in inner_loss",
    ),
    "a part of x is not used": (
        step(losses(lambda z, x, batch: x["s"] * outer_loss(z, x, batch))),
        ValueError,
        r"never uses outer_params\['u'\]",
    ),
    "an entry that G reads is missing": (
        step(batch=bf.Batch(without("y"), DATA)),
        ValueError,
        r"inner_loss reads batch\[\"y\"\].*\['a', 'index'\].*inner minibatches",
    ),
    "an entry that F reads is missing": (
        step(batch=bf.Batch(DATA, without("a"))),
        ValueError,
        r"outer_loss reads batch\[\"a\"\].*\['index', 'y'\].*outer minibatches",
    ),
    "model_state forgotten": (
        step(losses(stateful_loss, stateful_outer, stateful=True)),
        ValueError,
        r"reads model_state\[\"seen\"\].*given nothing: pass solver.init\(..., model_state=",
    ),
    "model_state of another kind": (
        step(losses(stateful_loss, stateful_outer, stateful=True), state={"batch_stats": 1.0}),
        ValueError,
        r"reads model_state\[\"seen\"\], but was given 'batch_stats'",
    ),
    "model_state is not returned": (
        step(
            losses(lambda *a: (inner(*a[:3]), bf.Aux({})), stateful_outer, stateful=True),
            state={"seen": jnp.ones(())},
        ),
        ValueError,
        r"inner_loss returned Aux\(model_state={}\), but was given {'seen'",
    ),
    "BatchNorm without its state": (
        lambda: step(losses(linen(Normed)), z=variables(Normed)["params"])(),
        ValueError,
        r"inner_loss: .*stateful=True.*solver.init\(..., model_state=",
    ),
    "dropout without a key": (
        lambda: step(losses(linen(Dropped)), z=variables(Dropped)["params"])(),
        ValueError,
        r"inner_loss: .*stateful=True.*rngs={\"dropout\": rng}",
    ),
    "losses of a linear model": (
        step(linear(inner_losses=lambda logits, x, batch: jnp.mean(logits) * x["s"])),
        TypeError,
        r"inner_losses must return one loss for each example, \[4\]",
    ),
    "logits that are none": (
        lambda: bf.linear_problem(logits=3, inner_losses=inner, outer_losses=inner),
        TypeError,
        r"logits must be a function, got 3",
    ),
    "a metric for each example, in parts": (
        step(
            oracles.microbatched(
                losses(
                    lambda *a: (inner(*a[:3]), bf.Aux({}, {"each": errors_of(a[0], a[2])})),
                    lambda *a: (outer_loss(*a[:3]), bf.Aux()),
                    stateful=True,
                ),
                2,
            )
        ),
        ValueError,
        r"the metric 'each' has shape \(2,\), but microbatches=2 averages.*scalars",
    ),
    # --- the start
    "an NNX module as z": (
        step(z=nnx.Linear(3, 1, rngs=nnx.Rngs(0))),
        TypeError,
        r"inner_params holds the NNX Linear.*bf.nnx.problem",
    ),
    "an NNX module in x": (
        step(x={"s": jnp.ones(()), "u": nnx.Linear(3, 1, rngs=nnx.Rngs(0))}),
        TypeError,
        r"outer_params holds the NNX Linear.*bf.nnx.problem",
    ),
    "an NNX State as z": (
        step(z=nnx.state(nnx.Linear(3, 1, rngs=nnx.Rngs(0)))),
        TypeError,
        r"inner_params holds the NNX State",
    ),
    "a string among the parameters": (
        step(z={"w": jnp.ones(3), "name": "mlp"}),
        TypeError,
        r"inner_params\['name'\] is a str; parameters are pytrees of arrays",
    ),
    "a function as z": (step(z=inner), TypeError, r"inner_params is a function"),
    "integers as z": (
        step(z={"w": jnp.arange(3)}),
        ValueError,
        r"inner_params has no floating-point leaf",
    ),
    "nothing as x": (step(x={}), ValueError, r"outer_params has no floating-point leaf"),
    "no entry in z": (
        step(z=jnp.zeros((0, 3))),
        ValueError,
        r"inner_params has no .* with an entry",
    ),
    # --- the minibatches
    "a tuple": (step(batch=(DATA, DATA)), TypeError, r"batch is a tuple.*bf.Batch\("),
    "a dict": (step(batch=DATA), TypeError, r"batch is a dict.*bf.Batch\("),
    "no validation minibatch": (
        step(batch=bf.Batch(DATA)),
        ValueError,
        r"batch.outer is None.*bf.Batch\(training_minibatch, validation_minibatch\)",
    ),
    "no training minibatch": (step(batch=bf.Batch(outer=DATA)), ValueError, r"batch.inner is None"),
    "nested: a list": (
        step(batch=[DATA, DATA], method=bf.amigo, inner_steps=2, adjoint_steps=2),
        TypeError,
        r"batch is a list.*bf.Batch\(",
    ),
    "no ids": (
        step(method=bf.saba, **SABA),
        ValueError,
        r"batch.inner_id is None, but saba needs.*inner_id=i, outer_id=j",
    ),
    "no ids with weights": (
        step(outer_weights=[0.5, 0.5]),
        ValueError,
        r"batch.outer_id is None.*outer_id=j",
    ),
    "an id that is no integer": (
        step(batch=bf.Batch(DATA, DATA, 0.0, 0), method=bf.saba, **SABA),
        TypeError,
        r"batch.inner_id=0.0 must be an integer",
    ),
    "no index": (
        step(ROWS, bf.Batch(without("index"), DATA)),
        ValueError,
        r"need batch\[\"index\"\].*\['a', 'y'\].*data.partition",
    ),
    "a minibatch that is an array": (
        step(ROWS, bf.Batch(jnp.ones((B, 3)), DATA)),
        ValueError,
        r"need batch\[\"index\"\]",
    ),
    "an index of floats": (
        step(ROWS, with_entry(index=jnp.ones(B))),
        TypeError,
        r"batch\[\"index\"\] must be integers, got float32",
    ),
    "an index of another length": (
        step(ROWS, with_entry(index=jnp.arange(3))),
        ValueError,
        r"batch\[\"index\"\] has shape \(3,\).*\[batch\].*'a': 4",
    ),
    "an index of columns": (
        step(ROWS, with_entry(index=jnp.ones((B, 1), int))),
        ValueError,
        r"batch\[\"index\"\] has shape \(4, 1\)",
    ),
    "a mask of another length": (
        step(ROWS, with_entry(example_mask=jnp.ones(3))),
        ValueError,
        r"batch\[\"example_mask\"\] has shape \(3,\).*\[4\]",
    ),
    "a mask of another shape than the values": (
        lambda: bf.masked_mean(jnp.ones(4), jnp.ones((4, 1))),
        ValueError,
        r"mask has shape \(4, 1\), values \(4,\)",
    ),
    "minibatches without their axis": (
        step(method=bf.amigo, inner_steps=2, adjoint_steps=2),
        ValueError,
        r"batch.inner.* has shape .*batches=.*leading axis",
    ),
    # --- data
    "arrays that are none": (
        lambda: data.partition(np.ones(3), 2),
        TypeError,
        r"arrays must be a dict of arrays, got ndarray",
    ),
    "lengths that differ": (
        lambda: data.partition({"x": np.ones(3), "y": np.ones(4)}, 2),
        ValueError,
        r"arrays must agree.*\"x\" has 3, \"y\" has 4",
    ),
    "more than there are": (
        lambda: data.partition({"x": np.ones(3)}, 5),
        ValueError,
        r"batch_size must lie between 1 and .*3, got 5",
    ),
    "a minibatch and a half": (
        lambda: data.partition({"x": np.ones(3)}, 1.5),
        TypeError,
        r"batch_size must be an integer, got 1.5",
    ),
    "a reserved name": (
        lambda: data.partition({"x": np.ones(3), "index": np.ones(3)}, 2),
        ValueError,
        r"arrays has the key \"index\".*rename",
    ),
    "a mask of one's own": (
        lambda: data.partition({"x": np.ones(3), "mask": np.ones(3)}, 2),
        ValueError,
        r"arrays has the key \"mask\".*rename",
    ),
    "an id past the end": (
        lambda: data.gather(data.partition({"x": np.ones(3)}, 1), np.array([3])),
        ValueError,
        r"ids must lie in \[0, 3\).*got 3.*Sampler\(3",
    ),
    "a seed that is none": (
        lambda: data.Sampler(3, seed=-1),
        ValueError,
        r"seed must be a non-negative integer, got -1",
    ),
    "a sampler without minibatches": (
        lambda: data.Sampler(0, 0),
        ValueError,
        r"num_batches must be an integer.*got 0",
    ),
    "one-hot labels": (
        lambda: data.check_labels(np.eye(3), 3),
        TypeError,
        r"labels must be integers \[n\].*one-hot",
    ),
    "a label outside the classes": (
        lambda: data.check_labels(np.array([0, 3]), 3),
        ValueError,
        r"labels\[1\] is 3, out of range for num_classes=3",
    ),
    "a percentage of noise": (
        lambda: data.corrupt_labels(np.zeros(3, int), 50, 10, 0),
        ValueError,
        r"p must be a probability in \[0, 1\], got 50",
    ),
    "other features": (
        lambda: data.standardize(np.ones((2, 3)), np.ones((2, 4))),
        ValueError,
        r"features differ: train has \[3\].*\[4\]",
    ),
    "a split of more than all": (
        lambda: data.stratified(np.zeros(4, int), {"train": 3, "test": 2}, seed=0),
        ValueError,
        r"train 3 \+ test 2 = 5 .* has 4",
    ),
    # --- outer parameters and their optimisers
    "weights of no example": (
        lambda: outer.sigmoid(0),
        ValueError,
        r"num_samples must be an integer >= 1, got 0",
    ),
    "weights of the data": (
        lambda: outer.softmax(DATA["y"]),
        ValueError,
        r"num_samples must be an integer >= 1, got",
    ),
    "one domain": (
        lambda: outer.domain_weights(1),
        ValueError,
        r"num_domains must be an integer >= 2, got 1",
    ),
    "a proposal with a hole": (
        lambda: outer.domain_weights(2, (1, 0)),
        ValueError,
        r"proposal=\(1, 0\) must be 2 positive numbers",
    ),
    "domains that are missing": (
        lambda: outer.domain_weights(2).weights(jnp.ones(2), DATA),
        ValueError,
        r"batch\[\"domain\"\].*\['a', 'index', 'y'\]",
    ),
    "domains that are floats": (
        lambda: outer.domain_weights(2).weights(jnp.ones(2), {"domain": jnp.ones(3)}),
        TypeError,
        r"batch\[\"domain\"\] must be integers, got float32",
    ),
    "losses that are missing": (
        lambda: outer.meta_weight_net().apply({}, DATA),
        ValueError,
        r"apply\(outer_params, batch, losses\)",
    ),
    "an operation that is unknown": (
        lambda: outer.image_policy(("rotat",)),
        ValueError,
        r"operations: 'rotat' is unknown.*did you mean 'rotate'",
    ),
    "a limit out of range": (
        lambda: outer.image_policy(("rotate",), limits={"rotate": 400.0}),
        ValueError,
        r"limits\['rotate'\]=400.0 must lie in \(0, 180\]",
    ),
    "images of bytes": (
        lambda: outer.image_policy(("rotate",)).apply(
            {}, jnp.ones((2, 4, 4, 1), jnp.uint8), jax.random.key(0)
        ),
        TypeError,
        r"images: expected floats in \[0, 1\], got uint8: divide by 255",
    ),
    "images without channels": (
        lambda: outer.image_policy(("rotate",)).apply({}, jnp.ones((2, 4, 4)), jax.random.key(0)),
        ValueError,
        r"images: expected \[batch, height, width, channels\], got shape \(2, 4, 4\)",
    ),
    "a policy by class without labels": (
        lambda: outer.signal_policy(("amplitude",), num_classes=2).apply(
            {}, jnp.ones((2, 8, 1)), jax.random.key(0)
        ),
        ValueError,
        r"labels are missing",
    ),
    "half a class": (
        lambda: outer.image_policy(("rotate",), num_classes=2.5),
        ValueError,
        r"num_classes must be an integer >= 1, got 2.5",
    ),
    "an operation alone": (
        lambda: architecture.mixture({"cell": 2}, ["conv"]),
        ValueError,
        r"operations=\('conv',\): give two or more",
    ),
    "edges that are none": (
        lambda: architecture.mixture({"cell": 0}, ["conv", "skip"]),
        ValueError,
        r"edges\['cell'\] must be an integer >= 1, got 0",
    ),
    "b1 of 1": (lambda: outer.lazy_adam(0.1, b1=1.0), ValueError, r"b1=1.0 must lie in \[0, 1\)"),
    "decay of 1": (
        lambda: outer.robust_sgd(0.1, decay=1),
        ValueError,
        r"decay=1 must lie in \[0, 1\)",
    ),
    "clip of 0": (lambda: outer.robust_sgd(0.1, clip=0), ValueError, r"clip=0 must be positive"),
    "rows that were not declared": (
        lambda: outer.lazy_adam(0.1).update(
            bf.Rows(jnp.arange(2), jnp.ones(2)), outer.lazy_adam(0.1).init(WEIGHTS), WEIGHTS
        ),
        TypeError,
        r"lazy_adam got Rows.*bf.Table\(leaf\)",
    ),
    # --- NNX
    "a linen module": (
        lambda: bf.nnx.problem(of_module, of_module, Normed(), jnp.ones(())),
        TypeError,
        r"model must be an nnx.Module, got Normed.*bf.Problem",
    ),
    "a module without parameters": (
        lambda: bf.nnx.problem(of_module, of_module, nnx.Dropout(0.5), jnp.ones(())),
        ValueError,
        r"Dropout has no variable that wrt=.*selects",
    ),
    "a tuple without has_aux": (
        nnx_step(lambda *a: (of_module(*a), {})),
        TypeError,
        r"inner_loss returned a tuple with has_aux=False",
    ),
    "no tuple with has_aux": (
        nnx_step(of_module, has_aux=True),
        TypeError,
        r"inner_loss returned no tuple with has_aux=True.*\(scalar, aux\)",
    ),
    "a problem in the place of a solver": (
        lambda: bf.nnx.Optimizer(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), PLAIN, X),
        TypeError,
        r"solver must be a BilevelSolver, got Problem",
    ),
    "NNX: a dict in the place of a Batch": (
        nnx_step(of_module, batch=DATA),
        TypeError,
        r"batch must be bf.Batch\(train_batch, validation_batch\), got dict",
    ),
    # --- oracles
    "v of another tree": (
        lambda: oracles.evaluate(PLAIN, bf.Variables(Z, [], X), bf.Batch(DATA, DATA)),
        ValueError,
        r"adjoint's tree differs from inner_params'.*solver.init",
    ),
    "v of another shape": (
        lambda: oracles.evaluate(
            PLAIN, bf.Variables(Z, {"w": jnp.ones(4)}, X), bf.Batch(DATA, DATA)
        ),
        ValueError,
        r"adjoint's leaf \['w'\] is float32\(4,\), inner_params' is float32\(3,\)",
    ),
    "parts that do not divide": (
        lambda: oracles.evaluate_subsample(
            PLAIN, bf.Variables(Z, Z, X), bf.Batch(DATA, DATA), block=0, parts=3
        ),
        ValueError,
        r"leaf of the minibatch has shape .*leading length that 3 divides",
    ),
}


@pytest.mark.parametrize(
    ("call", "error", "words"), ROWS_OF_MISTAKES.values(), ids=ROWS_OF_MISTAKES.keys()
)
def test_a_mistake_ends_in_one_line(call, error, words):
    assert_one_line(call, error, words)


@pytest.mark.parametrize("name", ["num_inner_batches", "num_outer_batches", "period"])
def test_numpys_integers_are_integers(name):
    options = {"num_inner_batches": 3, "num_outer_batches": 2, "period": 4}
    options[name] = np.int64(options[name])
    assert make(bf.srba, **options)().name == "srba"
