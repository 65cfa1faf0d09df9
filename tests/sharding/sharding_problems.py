"""Small networks on a mesh: an MLP with learned weights, a CNN with BatchNorm, a transformer.

They are in float64 where x64 is on, and small enough that 8 virtual devices take little longer
than one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.sharding import BATCH_AXES
from bilevel_flax.solvers import table
from bilevel_flax.solvers.first_order import estimator as penalty_estimator

BATCH, CLASSES = 16, 4
MINIBATCHES = 3
MODELS = ("mlp", "cnn", "transformer")
# For tests in the default run there is "plain", two matrices that compile in a second.
SOLVERS = ("soba", "saba", "srba")
MESHES = ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
# What is cut on the mesh with tensor = 2.
RULES = {
    "mlp": [("Dense_0/kernel", "fsdp,tensor"), ("Dense_1/kernel", "tensor,fsdp")],
    "cnn": [("Conv_0/kernel", "-,-,-,fsdp"), ("Dense_0/kernel", "fsdp,-")],
    "transformer": [
        ("(query|key|value|Dense_0)/kernel", "fsdp,tensor"),
        ("(out|Dense_1)/kernel", "tensor"),
    ],
}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(nn.Dense(32)(x))
        x = jnp.tanh(nn.Dense(32)(x))
        return nn.Dense(CLASSES)(x)


class Plain:
    def init(self, key, x, train):
        keys = jax.random.split(key)
        first = jax.random.normal(keys[0], (x.shape[1], 64)) / 5
        return {"params": {"first": first, "second": jax.random.normal(keys[1], (64, 32)) / 8}}

    def apply(self, variables, x, train):
        return jnp.tanh(x @ variables["params"]["first"]) @ variables["params"]["second"]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=BATCH_AXES)(x)
        x = nn.softplus(x).reshape(x.shape[0], -1)
        return nn.Dense(CLASSES)(x)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Embed(16, 16)(x)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(y, y)
        y = nn.LayerNorm()(x)
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(y)))
        return nn.Dense(CLASSES)(x.mean(1))


class Setting(NamedTuple):
    """A problem with its data and its start."""

    problem: bf.Problem
    inner: data.FiniteSum
    outer: data.FiniteSum
    inner_params: Any
    outer_params: Any
    model_state: Any
    rules: Any

    def batch(self, step: int) -> bf.Batch:
        i, j = step % MINIBATCHES, (step + step // MINIBATCHES) % MINIBATCHES
        pick = lambda side, k: jax.tree.map(lambda leaf: leaf[k], side.batches)
        return bf.Batch(pick(self.inner, i), pick(self.outer, j), np.int32(i), np.int32(j))


def examples(name: str, seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = {"plain": (32,), "mlp": (12,), "cnn": (5, 5, 2), "transformer": (6,)}[name]
    inputs = rng.normal(size=(count, *shape)).astype(np.float32)
    if name == "transformer":
        inputs = rng.integers(0, 16, (count, *shape)).astype(np.int32)
    return {"input": inputs, "label": rng.integers(0, CLASSES, count).astype(np.int32)}


def setting(name: str, ragged: bool = False, weights: bool | None = None) -> Setting:
    """One of `MODELS`.

    Args:
        name: which.
        ragged: the last minibatches are padded.
        weights: x has a weight for each example, or else for each class; None: in the MLPs.
    """
    if weights is None:
        weights = name in ("plain", "mlp")
    model = {"plain": Plain, "mlp": MLP, "cnn": CNN, "transformer": Transformer}[name]()
    count = MINIBATCHES * BATCH - (5 if ragged else 0)
    inner = data.partition(examples(name, 1, count), BATCH, seed=1)
    outer = data.partition(examples(name, 2, count), BATCH, seed=2)
    first = jnp.asarray(inner.batches["input"][0])
    variables = model.init(jax.random.key(0), first, train=False)
    per_sample = {"weights": True, "penalty": False} if weights else None
    x = {"penalty": jnp.full((), -4.0)}
    if weights:
        x["weights"] = jnp.zeros(inner.num_samples)
    else:
        x["class"] = jnp.zeros(CLASSES)

    def logits(z, batch, model_state, train):
        with_state = {"params": z, **(model_state or {})}
        if name != "cnn":
            return model.apply(with_state, batch["input"], train=train), model_state
        if train:
            return model.apply(with_state, batch["input"], train=True, mutable=["batch_stats"])
        return model.apply(with_state, batch["input"], train=False), model_state

    def nll(out, batch):
        return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])

    def inner_loss(z, x, batch, model_state=None, rng=None):
        out, after = logits(z, batch, model_state, True)
        learned = x["weights"] if weights else x["class"][batch["label"]]
        fit = bf.masked_mean(jax.nn.sigmoid(learned) * nll(out, batch), batch.get("mask"))
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(z))
        value = fit + jnp.exp(x["penalty"]) * squares
        return (value, bf.Aux(after, {"fit": fit})) if name == "cnn" else value

    def outer_loss(z, x, batch, model_state=None, rng=None):
        out, _ = logits(z, batch, model_state, False)
        value = bf.masked_mean(nll(out, batch), batch.get("mask"))
        return (value, bf.Aux(model_state)) if name == "cnn" else value

    problem = bf.Problem(inner_loss, outer_loss, stateful=name == "cnn", per_sample=per_sample)
    state = {"batch_stats": variables["batch_stats"]} if name == "cnn" else None
    return Setting(problem, inner, outer, variables["params"], x, state, RULES.get(name))


def solver(name: str, task: Setting, problem: bf.Problem, **more: Any) -> bf.BilevelSolver:
    """One of `SOLVERS` (or "auto", "first_order") for a setting."""
    by_row = bf.outer.lazy_sgd if problem.per_sample else optax.sgd
    arguments = {"inner": optax.adam(1e-2, eps=1e-2), "outer": by_row(0.5)}
    if name == "auto":
        arguments = {"inner": arguments["inner"], "steps": 20}
    if task.inner.ragged:
        arguments |= {"inner_weights": task.inner.weights, "outer_weights": task.outer.weights}
    if name in ("saba", "srba"):
        arguments |= {"num_inner_batches": MINIBATCHES, "num_outer_batches": MINIBATCHES}
    if name == "srba":
        arguments |= {"period": 8}
    if name == "first_order":  # without auto's steps, which follow an estimate of the residual
        return bf.single_loop(problem, penalty_estimator(), **arguments | more)
    return table.method(name)(problem, **arguments | more)


class Run(NamedTuple):
    """What `run` returns."""

    state: bf.TrainState  # NumPy leaves
    info: bf.Info
    compiled: Any  # the update
    traces: int
    not_donated: list[str]


def run(
    model: str,
    method: str,
    mesh_text: str | None,
    *,
    steps: int = 20,
    floor: bool | None = None,
    ragged: bool = False,
    rules: Any = None,
    **more: Any,
) -> Run:
    """Steps of a solver on a mesh, or on one device (None), by jit with pinned shardings.

    Args:
        model: one of `MODELS`.
        method: one of `SOLVERS`, or "auto".
        mesh_text: as for `make_mesh`.
        steps: how many.
        floor: one reduction a step, or what XLA makes of it; None: the first, unless tensor > 1.
        ragged: padded last minibatches.
        rules: of sharding.
        more: of the solver.
    """
    task = setting(model, ragged)
    text = "data=1" if mesh_text is None else mesh_text
    devices = jax.devices()[:1] if mesh_text is None else None
    mesh = bf.sharding.make_mesh(text, devices)
    if floor is None:
        floor = mesh.shape["tensor"] == 1
    if floor:
        problem = bf.sharding.data_parallel(task.problem, mesh, rules)
    else:
        problem = bf.sharding.whole(task.problem)
    chosen = solver(method, task, problem, **more)
    layout = bf.sharding.Layout(mesh, rules, task.problem)
    state = layout.place_state(
        chosen.init(task.inner_params, task.outer_params, model_state=task.model_state)
    )
    here = layout.state(state)
    traces = []

    def step(state, batch):
        traces.append(1)
        return chosen.update(state, batch)

    put = lambda batch: jax.device_put(batch, bf.sharding.batch_shardings(batch, mesh))
    first = put(task.batch(0))
    pinned = (here, bf.sharding.batch_shardings(first, mesh)), (here, layout.everywhere)
    jitted = jax.jit(step, in_shardings=pinned[0], out_shardings=pinned[1], donate_argnums=0)
    update = jitted.lower(state, first).compile()
    refresh = jax.jit(chosen.refresh, donate_argnums=0, out_shardings=here)
    not_donated = []
    info: Any = None
    for t in range(steps):
        if int(chosen.next_refresh(state)) <= t:
            for i in range(2 * MINIBATCHES):
                batch = task.batch(i % MINIBATCHES)
                inner = bf.Batch(inner=batch.inner, inner_id=batch.inner_id)
                outer = bf.Batch(outer=batch.outer, outer_id=batch.outer_id)
                state = refresh(state, put(inner if i < MINIBATCHES else outer))
        before = state
        state, info = update(state, put(task.batch(t)))
        not_donated += [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree.leaves_with_path(before)
            if not leaf.is_deleted()
        ]
    as_numpy = lambda tree: jax.tree.map(np.array, tree)
    return Run(as_numpy(state), as_numpy(info), update, len(traces), not_donated)


def largest_difference(one: Any, other: Any) -> float:
    """The largest absolute difference between leaves of two trees."""
    differences = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.float64(a) - np.float64(b)), initial=0.0)), one, other
    )
    return max(jax.tree.leaves(differences))
