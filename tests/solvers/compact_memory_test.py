"""SABA with residuals for memory: the full tables' iterates, n x classes numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.oracles.residual_codes import evaluate_linear
from bilevel_flax.train.setup import make_solver
from bilevel_flax.train.task import InitialValues, Task

N, M, FEATURES, CLASSES, BATCH = 23, 17, 6, 3, 4  # ragged on both sides
RHO, GAMMA = 0.2, 0.5


@dataclasses.dataclass(frozen=True)
class Toy:
    """Multinomial logistic regression: a weight for each example, a penalty for each feature."""

    problem: bf.Problem
    inner: data.FiniteSum
    outer: data.FiniteSum
    start: tuple[Any, Any]

    @property
    def settings(self):
        return {
            "num_inner_batches": self.inner.num_batches,
            "num_outer_batches": self.outer.num_batches,
            "inner_weights": self.inner.weights,
            "outer_weights": self.outer.weights,
        }

    def batch(self, i, j):
        pick = lambda part, k: jax.tree.map(lambda leaf: jnp.asarray(leaf)[k], part.batches)
        as_id = lambda k: jnp.asarray(k, jnp.int32)
        return bf.Batch(pick(self.inner, i), pick(self.outer, j), as_id(i), as_id(j))

    def solver(self, memory, outer=None, **more):
        return bf.saba(
            self.problem,
            inner=optax.sgd(RHO),
            outer=outer or optax.sgd(GAMMA),
            memory=memory,
            example_batch=self.batch(0, 0) if memory == "compact" else None,
            **self.settings,
            **more,
        )


def logits(z, batch):
    return batch["input"] @ z["kernel"] + z["bias"][None]


def entropies(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def penalty(z, x):
    return 0.5 * jnp.sum(jnp.exp(x["penalties"])[:, None] * z["kernel"] ** 2)


def toy(penalised=True, derivatives="forward_over_reverse") -> Toy:
    rng = np.random.default_rng(0)

    def draw(n):
        inputs = rng.normal(size=(n, FEATURES))
        return {"input": inputs, "label": rng.integers(CLASSES, size=n)}

    def inner_losses(logits, x, batch):
        values = jax.nn.sigmoid(x["weights"]) * entropies(logits, batch)
        if penalised:
            return values
        return values + jnp.exp(x["penalties"]).mean() * jnp.sum(logits**2, 1)

    problem = bf.linear_problem(
        logits,
        inner_losses,
        lambda logits, x, batch: entropies(logits, batch),
        inner_penalty=penalty if penalised else None,
        outer_penalty=(lambda z, x: 0.05 * jnp.sum(x["penalties"] ** 2)) if penalised else None,
        per_sample={"penalties": False, "weights": True},
        derivatives=derivatives,
    )
    z = {
        "kernel": jnp.asarray(rng.normal(size=(FEATURES, CLASSES))),
        "bias": jnp.asarray(rng.normal(size=CLASSES)),
    }
    x = {
        "penalties": jnp.asarray(rng.normal(size=FEATURES)) - 2,
        "weights": jnp.asarray(rng.normal(size=N)),
    }
    return Toy(problem, data.partition(draw(N), BATCH), data.partition(draw(M), BATCH), (z, x))


def ids(length):
    rng = np.random.default_rng(1)
    return rng.integers(-(-N // BATCH), size=length), rng.integers(-(-M // BATCH), size=length)


def run(solver, found: Toy, length=60):
    """The state after `length` updates, in one scan; the pass that is due first."""
    state = solver.init(*found.start)
    due = int(solver.next_refresh(state)) == 0

    def inner(i, state):
        return solver.refresh(state, found.batch(i, 0)._replace(outer=None, outer_id=None))

    def outer(j, state):
        return solver.refresh(state, found.batch(0, j)._replace(inner=None, inner_id=None))

    def body(state, pair):
        return solver.update(state, found.batch(*pair))

    @jax.jit
    def whole(state):
        if due:
            state = jax.lax.fori_loop(0, found.inner.num_batches, inner, state)
            state = jax.lax.fori_loop(0, found.outer.num_batches, outer, state)
        return jax.lax.scan(body, state, tuple(jnp.asarray(k) for k in ids(length)))

    return whole(state)


def assert_close(one, other, tolerance=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), one, other)


@pytest.mark.parametrize("derivatives", ["forward_over_reverse", "reverse_over_reverse"])
def test_codes_and_penalties_add_up_to_the_oracles(x64, derivatives):
    found = toy(derivatives=derivatives)
    z, x = found.start
    point = bf.Variables(z, jax.tree.map(lambda leaf: leaf[::-1] + 0.3, z), x)
    batch = found.batch(found.inner.num_batches - 1, 0)  # a ragged one

    def both(point, batch):
        whole = evaluate_linear(found.problem, point, batch)
        plain = bf.oracles.evaluate_all(found.problem, point, batch)
        return whole[:3], plain[:3], whole.codes.residuals

    whole, plain, codes = jax.jit(both)(point, batch)
    assert_close(whole, plain, 1e-12)
    assert codes.inner_grad.shape == codes.hvp.shape == (BATCH, CLASSES)
    assert codes.cross_jvp["penalties"] is None  # only the penalty uses them


@pytest.mark.parametrize("init_tables", ["zero", "refresh"])
def test_without_penalties_the_iterates_are_the_full_tables(x64, init_tables):
    found = toy(penalised=False)
    full, compact = (
        run(found.solver(memory, init_tables=init_tables), found) for memory in ("full", "compact")
    )
    assert_close(compact[0].variables, full[0].variables)
    assert_close(compact[1], full[1], 1e-9)  # what is reported of each step, too
    moved = jax.tree.map(lambda a, b: a - b, full[0].variables[::2], found.start)
    assert np.abs(ravel_pytree(moved)[0]).min() > 1e-4


def test_rows_for_a_lazy_optimiser(x64):
    found = toy(penalised=False)
    lazy = bf.outer.lazy_sgd(GAMMA)
    full, compact = (
        run(found.solver(memory, outer=lazy), found)[0] for memory in ("full", "compact")
    )
    assert_close(compact.variables, full.variables)
    assert compact.estimator_state.per_sample["weights"] is None


class Transcription:
    """SABA with dense tables [N, p] of the data's part, the penalties exact; plain NumPy."""

    def __init__(self, found: Toy):
        self.found = found
        z, x = jax.tree.map(lambda leaf: np.array(leaf, np.float64), found.start)
        self.z = np.vstack([z["kernel"], z["bias"]])  # a last feature of ones
        self.v = np.zeros_like(self.z)
        self.penalties, self.weights = x["penalties"], x["weights"]
        shape = self.z.shape
        n, m = found.inner.num_batches, found.outer.num_batches
        self.grads, self.products = np.zeros((n, *shape)), np.zeros((n, *shape))
        self.outers, self.crosses = np.zeros((m, *shape)), np.zeros((n, N))

    def examples(self, part, k):
        real = part.batches.get("mask", np.ones((part.num_batches, BATCH)))[k] > 0
        inputs = part.batches["input"][k][real]
        targets = np.eye(CLASSES)[part.batches["label"][k][real]]
        share = part.num_batches * float(part.weights[k])
        ones = np.ones((len(inputs), 1))
        return np.hstack([inputs, ones]), targets, part.batches["index"][k][real], share

    def probabilities(self, inputs):
        scores = inputs @ self.z
        powers = np.exp(scores - scores.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    @staticmethod
    def visit(table, k, new):
        estimate = new - table[k] + table.mean(0)
        table[k] = new
        return estimate

    def step(self, i, j):
        inputs, targets, index, share = self.examples(self.found.inner, i)
        chances, moved = self.probabilities(inputs), inputs @ self.v
        weight = 1 / (1 + np.exp(-self.weights[index]))
        scale = (share * weight / len(inputs))[:, None]
        wrong = chances - targets
        curved = chances * moved - chances * np.sum(chances * moved, 1, keepdims=True)
        d_z = self.visit(self.grads, i, inputs.T @ (scale * wrong))
        d_v = self.visit(self.products, i, inputs.T @ (scale * curved))
        cross = np.zeros(N)
        slope = share / len(inputs) * weight * (1 - weight)
        cross[index] = slope * np.sum(wrong * moved, 1)
        d_weights = self.visit(self.crosses, i, cross)

        inputs, targets, _, share = self.examples(self.found.outer, j)
        wrong = share / len(inputs) * (self.probabilities(inputs) - targets)
        d_v = d_v + self.visit(self.outers, j, inputs.T @ wrong)

        rates = np.append(np.exp(self.penalties), 0.0)[:, None]  # the bias has none
        d_z, d_v = d_z + rates * self.z, d_v + rates * self.v
        d_penalties = np.sum(rates * self.z * self.v, 1)[:-1] + 0.1 * self.penalties
        self.z, self.v = self.z - RHO * d_z, self.v - RHO * d_v
        self.penalties = self.penalties - GAMMA * d_penalties
        self.weights = self.weights - GAMMA * d_weights


def test_with_penalties_the_iterates_are_those_of_dense_tables(x64):
    found = toy()
    state, _ = run(found.solver("compact"), found)
    dense = Transcription(found)
    for i, j in zip(*ids(60), strict=True):
        dense.step(i, j)
    as_matrix = lambda tree: np.vstack([tree["kernel"], tree["bias"]])
    assert_close(as_matrix(state.inner_params), dense.z)
    assert_close(as_matrix(state.adjoint), dense.v)
    expected = {"penalties": dense.penalties, "weights": dense.weights}
    assert_close(state.outer_params, expected)
    assert np.isfinite(dense.z).all() and np.abs(dense.v).max() > 1e-2


def test_the_memory_is_a_number_for_each_example_and_class():
    """MNIST cleaning, n = 20,000: residuals, their derivatives and 5,000 outer ones."""
    sides = [
        {
            "image": jax.ShapeDtypeStruct((64, 28, 28, 1), jnp.float32),
            "label": jax.ShapeDtypeStruct((64,), jnp.int32),
            "index": jax.ShapeDtypeStruct((64,), jnp.int32),
        }
        for _ in range(2)
    ]
    problem = bf.linear_problem(
        lambda z, batch: batch["image"].reshape(64, -1) @ z,
        lambda logits, x, batch: jax.nn.sigmoid(x) * entropies(logits, batch),
        lambda logits, x, batch: entropies(logits, batch),
        inner_penalty=lambda z, x: 0.2 * jnp.sum(z**2),
        per_sample=True,
    )
    counts = {"num_inner_batches": 313, "num_outer_batches": 79}
    sizes = {}
    for memory in ("full", "compact"):
        solver = bf.saba(
            problem,
            inner=optax.sgd(0.1),
            outer=optax.sgd(0.1),
            memory=memory,
            example_batch=bf.Batch(*sides),
            **counts,
        )
        state = jax.eval_shape(solver.init, jnp.zeros((784, 10)), jnp.zeros(20_000))
        tables = state.estimator_state.inner.table, state.estimator_state.outer.table
        sizes[memory] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tables))
    assert sizes["compact"] == 4 * 10 * 64 * (2 * 313 + 79)
    assert sizes["full"] == 4 * 7840 * (2 * 313 + 79)


def test_one_trace_donation_and_no_copy_of_a_table():
    found = toy()
    solver = found.solver("compact")
    state = solver.init(*found.start)
    pairs = tuple(jnp.asarray(k) for k in ids(20))

    def steps(state):
        body = lambda state, pair: (solver.update(state, found.batch(*pair))[0], None)
        return jax.lax.scan(body, state, pairs)[0]

    step = jax.jit(steps, donate_argnums=0)
    compiled = step.lower(state).compile()
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.estimator_state.inner.table)}
    shapes |= {leaf.shape for leaf in jax.tree.leaves(state.estimator_state.outer.table)}
    assert shapes == {(6, BATCH, CLASSES), (5, BATCH, CLASSES)}
    copied = re.findall(r"= [a-z0-9]+\[([\d,]+)\][^ ]* copy(?:-start)?\(", compiled.as_text())
    assert not {tuple(map(int, shape.split(","))) for shape in copied} & shapes
    after = step(state)
    assert jax.tree.leaves(state.estimator_state.inner.table)[0].is_deleted()
    step(after)
    assert step._cache_size() == 1


@functools.cache
def shared() -> Toy:
    return toy()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"memory": "tiny"}, ValueError, r"memory='tiny' is unknown: choose"),
        ({"example_batch": None}, ValueError, r"needs example_batch=Batch\(inner, outer\)"),
        ({"problem": bf.Problem(lambda *a: 0.0, lambda *a: 0.0)}, ValueError, "bf.linear_problem"),
    ],
)
def test_what_a_compact_memory_needs_is_said(change, error, message):
    found = shared()
    given = {"memory": "compact", "example_batch": found.batch(0, 0), "problem": found.problem}
    given |= change
    problem = given.pop("problem")
    with pytest.raises(error, match=message) as caught:
        bf.saba(problem, inner=optax.sgd(1.0), outer=optax.sgd(1.0), **found.settings, **given)
    assert "\n" not in str(caught.value)


def test_what_is_not_linear_or_not_of_the_examples_shape_is_refused():
    found = shared()
    losses = lambda logits, x, batch: entropies(logits, batch)
    like = found.batch(0, 0)
    optimisers = {"inner": optax.sgd(1.0), "outer": optax.sgd(1.0)}

    def solver(problem):
        return bf.saba(
            problem, **optimisers, **found.settings, memory="compact", example_batch=like
        )

    bent = lambda z, batch: jnp.tanh(batch["input"] @ z["kernel"])
    problem = bf.linear_problem(bent, losses, losses, inner_penalty=penalty)
    with pytest.raises(ValueError, match="logits is not linear in inner_params"):
        jax.eval_shape(solver(problem).init, *found.start)

    problem = bf.linear_problem(logits, lambda *a: losses(*a).mean(), losses)
    with pytest.raises(TypeError, match=r"inner_losses must return one loss for each example"):
        jax.eval_shape(solver(problem).init, *found.start)

    hidden = dataclasses.replace(
        found.problem,
        inner_loss=dataclasses.replace(
            found.problem.inner_loss, penalty=lambda z, x: jnp.sum(x["weights"])
        ),
    )
    with pytest.raises(ValueError, match="inner_penalty uses a per-sample leaf"):
        jax.eval_shape(solver(hidden).init, *found.start)

    with pytest.raises(TypeError, match="outer_penalty must be a function, got 3"):
        bf.linear_problem(logits, losses, losses, outer_penalty=3)  # pyright: ignore

    state = jax.eval_shape(solver(found.problem).init, *found.start)
    short = like._replace(inner=jax.tree.map(lambda leaf: leaf[:2], like.inner))
    with pytest.raises(ValueError, match=r"gives \(2, 3\) to memorise.*rows are \(4, 3\)"):
        jax.eval_shape(solver(found.problem).update, state, short)


def test_a_config_asks_for_it_in_one_word():
    found = shared()
    task = Task(
        found.problem,
        lambda rng: InitialValues(*found.start),
        found.inner,
        found.outer,
        lambda state: {},
    )
    sgd = {"call": "optax:sgd", "learning_rate": 0.1}
    config = {"call": "bilevel_flax:saba", "memory": "compact", "inner": sgd, "outer": sgd}
    solver = make_solver(ml_collections.ConfigDict(config), task)
    state = jax.eval_shape(solver.init, *found.start)
    assert state.estimator_state.outer.table.rows.outer_grad_inner.shape == (5, BATCH, CLASSES)
