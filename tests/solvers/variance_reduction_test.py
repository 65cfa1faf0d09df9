"""SABA, SRBA, SPABA and the momentum estimators: the identities that make them what they are."""

from __future__ import annotations

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import serialization
from jax.flatten_util import ravel_pytree
from problems import logistic

import bilevel_flax as bf
from bilevel_flax import contrib
from bilevel_flax.base import NEVER
from bilevel_flax.contrib.spaba import geometric_schedule
from bilevel_flax.solvers import table


@functools.cache
def jitted(function):
    """One compilation for each solver, however many tests call it."""
    return jax.jit(function)


# One leaf each: deeper trees are the conformance table's business.
quadratics = functools.partial(
    problems.quadratics, inner_shapes={"w": (4,)}, outer_shapes={"u": (2,)}
)

ONE = {"inner": optax.sgd(1.0), "outer": optax.sgd(1.0)}  # a step is minus the direction


def counts(data, weights=True):
    num_inner, num_outer = len(data.inner_weights), len(data.outer_weights)
    found = {"num_inner_batches": num_inner, "num_outer_batches": num_outer}
    if weights:
        found |= {"inner_weights": data.inner_weights, "outer_weights": data.outer_weights}
    return found


@functools.cache
def ragged():
    """The quadratic of most tests, in float64 (under `x64`)."""
    return quadratics(ragged=True)


@functools.cache
def unit_saba():
    return bf.saba(ragged().problem, **ONE, **counts(ragged()), init_tables="refresh")


@functools.cache
def unit_soba():
    sides = ("inner_weights", "outer_weights")
    return bf.soba(ragged().problem, **ONE, **{side: counts(ragged())[side] for side in sides})


@functools.cache
def unit_srba():
    return bf.srba(ragged().problem, **ONE, **counts(ragged()), period=10)


def at(state, variables):
    z, v, x = variables
    return state.replace(inner_params=z, adjoint=v, outer_params=x)


def all_pairs(data):
    i, j = np.meshgrid(
        np.arange(len(data.inner_weights)), np.arange(len(data.outer_weights)), indexing="ij"
    )
    return jnp.asarray(i.ravel()), jnp.asarray(j.ravel())


def every_direction(solver, data, state):
    """Flat directions [N·M, p + p + d] for all pairs of minibatches; the solver has unit steps."""

    def one(state, batch):
        new, _ = solver.update(state, batch)
        return ravel_pytree(jax.tree.map(jnp.subtract, state.variables, new.variables))[0]

    if solver not in _EVERY:
        _EVERY[solver] = jax.jit(jax.vmap(one, in_axes=(None, 0)))
    return np.asarray(_EVERY[solver](state, data.batch(*all_pairs(data))))


_EVERY = {}


def full_pass(solver, data, state, start=0, stop=None):
    """Refresh calls start..stop of a pass, in the order that `refresh_cursor` counts."""
    num_inner, num_outer = len(data.inner_weights), len(data.outer_weights)
    refresh = jitted(solver.refresh)
    for at in range(num_inner + num_outer)[start:stop]:
        assert int(solver.refresh_cursor(state)) == at
        if at < num_inner:
            both = data.batch(at, 0)
            part = bf.Batch(both.inner, None, both.inner_id, None)
        else:
            both = data.batch(0, at - num_inner)
            part = bf.Batch(None, both.outer, None, both.outer_id)
        state = refresh(state, part)
    return state


def steps(solver, data, state, length, seed=0):
    """`length` updates on minibatches drawn uniformly, in one scan."""
    num_inner, num_outer = len(data.inner_weights), len(data.outer_weights)

    def body(state, key):
        i, j = jax.random.randint(key, (2,), 0, jnp.array([num_inner, num_outer]))
        return solver.update(state, data.batch(i, j))[0], None

    keys = jax.random.split(jax.random.PRNGKey(seed), length)
    return jax.jit(lambda state: jax.lax.scan(body, state, keys)[0])(state)


def components(memory):
    """All of them, the row whose write is pending in its place."""
    write = lambda rows, row: rows.at[memory.pending_id].set(row)
    return jax.tree.map(write, memory.table.rows, memory.pending)


def random_tables(state, seed=0):
    """SABA's state with arbitrary stale rows, and means that belong to them."""
    rng = np.random.default_rng(seed)

    def refill(memory):
        noise = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        memory = memory.replace(
            table=bf.Table(jax.tree.map(noise, memory.table.rows)),
            pending=jax.tree.map(noise, memory.pending),
            pending_id=jnp.int32(2),
        )
        return memory.replace(mean=jax.tree.map(lambda rows: rows.mean(0), components(memory)))

    memory = state.estimator_state
    per_sample = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), memory.per_sample
    )
    return state.replace(
        estimator_state=memory.replace(
            inner=refill(memory.inner), outer=refill(memory.outer), per_sample=per_sample
        )
    )


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def mean_error(memory):
    """Largest difference between the running means and the means of the tables."""
    exact = jax.tree.map(lambda rows: rows.astype(jnp.float32).mean(0), components(memory))
    return float(np.abs(flat(exact) - flat(memory.mean)).max())


# --- SABA -----------------------------------------------------------------------------------------


def test_saba_is_unbiased_whatever_the_tables_hold(x64):
    data, solver = ragged(), unit_saba()
    start = at(solver.init(data.inner_params, data.outer_params), data.random_variables())
    found = every_direction(solver, data, random_tables(start))
    expected = flat(data.full_directions(data.random_variables()))
    np.testing.assert_allclose(found.mean(0), expected, rtol=0, atol=1e-12)
    assert np.abs(found - expected).max() > 0.1  # and each of them is far off


def test_saba_per_sample_rows_are_unbiased(x64):
    data = logistic()
    solver = bf.saba(data.problem, **ONE, **counts(data))
    sgd = bf.soba(data.problem, **ONE, inner_weights=data.inner_weights,
                  outer_weights=data.outer_weights)  # fmt: skip
    v = jax.tree.map(jnp.ones_like, data.inner_params)
    point = bf.Variables(data.inner_params, v, data.outer_params)
    start = at(solver.init(data.inner_params, data.outer_params), point)
    stale = random_tables(start)
    # Each row lives in one minibatch, so any memory at all is a valid one.
    plain = at(sgd.init(data.inner_params, data.outer_params), point)
    np.testing.assert_allclose(
        every_direction(solver, data, stale).mean(0),
        every_direction(sgd, data, plain).mean(0),
        rtol=0,
        atol=1e-12,
    )


def test_saba_one_epoch_at_a_frozen_point_makes_the_mean_the_full_gradient(x64):
    data = ragged()
    still = optax.sgd(0.0)
    solver = bf.saba(data.problem, inner=still, outer=still, **counts(data))
    point = data.random_variables()
    state = at(solver.init(data.inner_params, data.outer_params), point)
    state = random_tables(state)
    update = jitted(solver.update)
    for k in range(4):
        state, _ = update(state, data.batch(k, k % 3))
    inner, outer = state.estimator_state.inner.mean, state.estimator_state.outer.mean
    full = data.full_directions(point)
    np.testing.assert_allclose(flat(inner.inner_grad), flat(full.inner), atol=1e-12)
    np.testing.assert_allclose(
        flat(inner.hvp) + flat(outer.outer_grad_inner), flat(full.adjoint), atol=1e-12
    )
    np.testing.assert_allclose(
        flat(inner.cross_jvp) + flat(outer.outer_grad_outer), flat(full.outer), atol=1e-12
    )
    # At this point no minibatch is noisy any more.
    spread = np.ptp(every_direction(unit_saba(), data, state), axis=0).max()
    assert spread < 1e-12


@pytest.mark.parametrize("table_dtype", [None, jnp.bfloat16])
def test_saba_running_means_stay_the_means_of_the_tables(table_dtype):
    data = quadratics(num_inner=32, num_outer=16, dtype=jnp.float32)
    solver = bf.saba(
        data.problem,
        inner=optax.sgd(0.02),
        outer=optax.sgd(0.01),
        **counts(data),
        table_dtype=table_dtype,
    )
    state = steps(solver, data, solver.init(data.inner_params, data.outer_params), 20_000)
    memory = state.estimator_state
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(memory.inner.table))
    assert largest > 0.5
    for side in (memory.inner, memory.outer):
        assert {leaf.dtype for leaf in jax.tree.leaves(side.mean)} == {jnp.dtype("float32")}
        assert mean_error(side) < 2e-5, mean_error(side)


def test_saba_variance_falls_with_the_distance_squared_and_sobas_does_not(x64):
    data, solver, plain = ragged(), unit_saba(), unit_soba()
    x = data.x_star()
    target = bf.Variables(data.z_star(x), data.v_star(x), x)
    state = full_pass(solver, data, at(solver.init(data.inner_params, x), target))
    away = data.random_variables(5)

    def variance(solver, state, distance):
        point = jax.tree.map(lambda u, du: u + distance * du, target, away)
        return float(every_direction(solver, data, at(state, point)).var(0).sum())

    saba = [variance(solver, state, d) for d in (1e-1, 1e-2, 1e-3)]
    np.testing.assert_allclose([saba[0] / saba[1], saba[1] / saba[2]], 100, rtol=1e-6)
    bare = plain.init(data.inner_params, x)
    soba = [variance(plain, bare, d) for d in (1e-1, 1e-3)]
    assert soba[1] > 0.5 * soba[0]


def test_saba_first_pass_fills_the_tables_and_happens_once(x64):
    data, solver = ragged(), unit_saba()
    state = solver.init(data.inner_params, data.outer_params)
    assert int(solver.next_refresh(state)) == 0
    point = data.random_variables()
    half = full_pass(solver, data, at(state, point), stop=3)
    assert int(solver.next_refresh(half)) == 0
    # Interrupted here: what is saved and restored goes on to the same bits.
    saved = serialization.to_bytes(half)
    restored = jax.tree.map(jnp.asarray, serialization.from_bytes(half, saved))
    resumed = full_pass(solver, data, restored, start=3)
    straight = full_pass(solver, data, at(state, point))
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert int(solver.next_refresh(resumed)) == NEVER
    assert int(solver.refresh_cursor(resumed)) == 0
    found = every_direction(solver, data, resumed)
    expected = flat(data.full_directions(point))
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-12)
    lazy = bf.saba(data.problem, **ONE, **counts(data))
    assert int(lazy.next_refresh(lazy.init(data.inner_params, data.outer_params))) == NEVER


def per_sample_run(method, declared, length=25, **kwargs):
    data = logistic(per_sample=declared)
    solver = method(
        data.problem, inner=optax.sgd(0.3), outer=optax.sgd(0.5), **counts(data), **kwargs
    )
    state = solver.init(data.inner_params, data.outer_params)
    if int(solver.next_refresh(state)) == 0:
        state = full_pass(solver, data, state)
    return steps(solver, data, state, length)


@pytest.mark.parametrize(
    "method, kwargs",
    [(bf.saba, {}), (bf.srba, {"period": 99})],
    ids=["saba", "srba"],
)
def test_per_sample_rows_follow_the_dense_method_exactly(x64, method, kwargs):
    """One n-vector does what a table [N, n] does, padded rows of ragged minibatches included."""
    declared = per_sample_run(method, True, **kwargs)
    dense = per_sample_run(method, False, **kwargs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        declared.variables,
        dense.variables,
    )
    if method is bf.saba:
        shapes = [leaf.shape for leaf in jax.tree.leaves(declared.estimator_state.inner.table)]
        assert shapes == [(4,), (4, 3), (4,), (4, 3), (4,)]  # no [4, 7] for the 7 examples
        assert declared.estimator_state.per_sample["logits"].shape == (7,)


def test_repeated_examples_within_a_minibatch_keep_the_memory_right(x64):
    data = logistic()
    problem = bf.Problem(
        lambda z, x, batch: jnp.sum(x["logits"] * (batch["inputs"] @ z["w"])) + x["penalty"],
        data.problem.outer_loss,
        per_sample={"logits": True, "penalty": False},
    )
    solver = bf.saba(problem, **ONE, num_inner_batches=2, num_outer_batches=1)
    z, x = data.inner_params, data.outer_params
    state = solver.init(z, x)
    state = at(state, bf.Variables(z, jax.tree.map(jnp.ones_like, z), x))
    outer = data.batch(0, 0).outer
    inputs = jnp.ones((3, 3))
    inner = {"inputs": inputs, "index": jnp.array([1, 1, 4], jnp.int32)}
    for _ in range(2):
        state, _ = jitted(solver.update)(state, bf.Batch(inner, outer, jnp.int32(0), jnp.int32(0)))
        v = float(state.adjoint["w"].sum())
    found = state.estimator_state.per_sample["logits"]
    assert float(found[1]) == pytest.approx(2 * float(found[4]))
    assert np.isfinite(v) and float(found[0]) == 0


def test_lazy_rows_need_no_memory_and_are_handed_on_as_the_minibatch_gave_them(x64):
    data = logistic()
    lazy = {"inner": optax.sgd(0.3), "outer": bf.outer.lazy_sgd(0.5)}
    plain = bf.soba(data.problem, **lazy, inner_weights=data.inner_weights,
                    outer_weights=data.outer_weights)  # fmt: skip
    expected = None
    for method, extra, previous in (
        (plain, {}, 0),
        (bf.saba, counts(data), 0),
        (bf.srba, counts(data) | {"period": 5}, 1),  # the previous point holds x
    ):
        solver = method if method is plain else method(data.problem, **lazy, **extra)
        state = solver.init(data.inner_params, data.outer_params)
        vectors = [leaf for leaf in jax.tree.leaves(state.estimator_state) if leaf.shape == (7,)]
        assert len(vectors) == previous
        if int(solver.next_refresh(state)) == 0:
            state = full_pass(solver, data, state)
        point = bf.Variables(
            data.inner_params, jax.tree.map(jnp.ones_like, data.inner_params), data.outer_params
        )
        state, info = jitted(solver.update)(at(state, point), data.batch(1, 1))
        assert bool(info.finite.outer)
        moved = state.outer_params["logits"] - data.outer_params["logits"]
        assert (np.asarray(moved) != 0).sum() == 2  # the minibatch's rows, no other
        expected = moved if expected is None else expected
        np.testing.assert_allclose(moved, expected, rtol=1e-12)


def test_saba_finds_the_solution_with_constant_steps_where_soba_stalls(x64):
    data = ragged()
    start = data.inner_params, data.outer_params
    steps_of = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.03)}

    def end(solver, length):
        state = steps(solver, data, solver.init(*start), length)
        return float(np.sum(flat(data.grad_h(state.outer_params)) ** 2))

    saba = end(bf.saba(data.problem, **steps_of, **counts(data)), 6000)
    weights = {"inner_weights": data.inner_weights, "outer_weights": data.outer_weights}
    soba = end(bf.soba(data.problem, **steps_of, **weights), 6000)
    assert saba <= 1e-20, saba
    assert soba >= 1e-5, soba


# --- the compiled loop ----------------------------------------------------------------------------


def table_copies(text, shapes):
    """Copies of arrays of these shapes in an HLO listing."""
    found = re.findall(r"= [a-z0-9]+\[([\d,]+)\][^ ]* copy(?:-start)?\(", text)
    return [shape for shape in found if tuple(map(int, shape.split(","))) in shapes]


def test_the_compiled_loop_copies_no_table():
    rows_inner, rows_outer, p, d = 301, 203, 170, 13
    rng = np.random.default_rng(0)
    inner = jnp.asarray(rng.normal(size=(rows_inner, 4, p)), jnp.float32)
    outer = jnp.asarray(rng.normal(size=(rows_outer, 4, p)), jnp.float32)
    problem = bf.Problem(
        lambda z, x, batch: (
            0.5 * jnp.mean((batch @ z - 1) ** 2) + 0.5 * jnp.exp(x).mean() * jnp.sum(z**2)
        ),
        lambda z, x, batch: 0.5 * jnp.mean((batch @ z + 1) ** 2),
    )
    solver = bf.saba(
        problem,
        inner=optax.sgd(1e-3),
        outer=optax.sgd(1e-3),
        num_inner_batches=rows_inner,
        num_outer_batches=rows_outer,
    )

    def run(state, inner, outer):
        def body(state, key):
            i, j = jax.random.randint(key, (2,), 0, jnp.array([rows_inner, rows_outer]))
            return solver.update(state, bf.Batch(inner[i], outer[j], i, j))[0], None

        keys = jax.random.split(jax.random.PRNGKey(0), 50)
        return jax.lax.scan(body, state, keys)[0]

    state = solver.init(jnp.zeros(p), jnp.zeros(d))
    step = jax.jit(run, donate_argnums=0).lower(state, inner, outer).compile()
    shapes = {(rows_inner, p), (rows_inner, d), (rows_outer, p), (rows_outer, d)}
    assert table_copies(step.as_text(), shapes) == []
    assert step.memory_analysis().temp_size_in_bytes < rows_outer * p * 4 / 2

    # A single donated update, outside any loop, neither.
    batch = bf.Batch(inner[0], outer[0], jnp.int32(0), jnp.int32(0))
    single = jax.jit(solver.update, donate_argnums=0).lower(state, batch).compile()
    assert table_copies(single.as_text(), shapes) == []
    assert single.memory_analysis().temp_size_in_bytes < rows_outer * p * 4 / 2


def test_the_check_for_copies_sees_one():
    """Reading a row and then writing it, the obvious way, is what the check must catch."""

    def visit(table, i, value):
        return table.at[i].set(value), value - table[i]

    table = jnp.zeros((301, 170))
    args = table, jnp.int32(0), jnp.ones(170)
    step = jax.jit(visit, donate_argnums=0).lower(*args).compile()
    temp = step.memory_analysis().temp_size_in_bytes
    assert table_copies(step.as_text(), {(301, 170)}) or temp >= 301 * 170 * 4


def test_saba_memory_is_its_three_tables_and_little_else():
    """MNIST cleaning: 784 x 10 weights, 20,000 examples in 313 minibatches, 79 outer ones."""
    entropy = lambda z, batch: jnp.mean(batch @ z, 1)
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(x * entropy(z, batch)),
        lambda z, x, batch: entropy(z, batch).mean(),
        per_sample=True,
    )
    solver = bf.saba(problem, **ONE, num_inner_batches=313, num_outer_batches=79)
    state = jax.eval_shape(solver.init, jnp.zeros((784, 10)), jnp.zeros(20_000))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.estimator_state))
    tables = 4 * 7840 * (2 * 313 + 79)
    assert tables <= size <= 1.1 * tables + 4 * 20_000
    temp = jax.jit(solver.init).lower(jnp.zeros((784, 10)), jnp.zeros(20_000)).compile()
    assert temp.memory_analysis().temp_size_in_bytes < tables / 100


# --- SRBA and SPABA -------------------------------------------------------------------------------


def test_srba_identity_by_enumeration(x64):
    """E[d_k] = D(u_k) - D(u_{k-1}) + d_{k-1}; SARAH is not unbiased, so this is what holds."""
    data, solver = ragged(), unit_srba()
    state = solver.init(data.inner_params, data.outer_params)
    before, now, carried = (data.random_variables(seed) for seed in (1, 2, 3))
    memory = state.estimator_state.replace(directions=carried, previous=before)
    found = every_direction(solver, data, at(state, now).replace(estimator_state=memory))
    change = flat(data.full_directions(now)) - flat(data.full_directions(before))
    np.testing.assert_allclose(found.mean(0), flat(carried) + change, rtol=0, atol=1e-12)


def test_srba_full_pass_is_the_full_direction_and_resumes_bit_for_bit(x64):
    data, solver = ragged(), unit_srba()
    state = solver.init(data.inner_params, data.outer_params)
    assert int(solver.next_refresh(state)) == 0
    noisy = state.estimator_state.replace(
        directions=data.random_variables(8), previous=data.random_variables(9)
    )
    point = data.random_variables()
    start = at(state, point).replace(estimator_state=noisy)
    half = full_pass(solver, data, start, stop=5)
    saved = serialization.to_bytes(half)
    restored = jax.tree.map(jnp.asarray, serialization.from_bytes(half, saved))
    resumed = full_pass(solver, data, restored, start=5)
    straight = full_pass(solver, data, start)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert int(solver.next_refresh(resumed)) == 10
    # The restart wipes out the error: every minibatch now gives the full direction.
    found = every_direction(solver, data, resumed)
    expected = flat(data.full_directions(point))
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-12)
    # No iterate moved.
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, point)


def test_srba_telescopes(x64):
    """With one minibatch in all, the differences add up to the full direction at every step."""
    data = quadratics(num_inner=1, num_outer=1, batch=3)
    optimisers = {"inner": optax.sgd(0.2), "outer": optax.sgd(0.1)}
    solver = bf.srba(data.problem, **optimisers, **counts(data), period=100)
    state = full_pass(solver, data, solver.init(data.inner_params, data.outer_params))
    update = jitted(solver.update)
    for _ in range(6):
        point = state.variables
        state, _ = update(state, data.batch(0, 0))
        found = flat(state.estimator_state.directions)
        np.testing.assert_allclose(found, flat(data.full_directions(point)), atol=1e-12)


def test_srba_does_not_run_on_without_its_full_pass(x64):
    data, solver = ragged(), unit_srba()
    state = solver.init(data.inner_params, data.outer_params)
    new, info = jitted(solver.update)(state, data.batch(0, 0))
    assert not bool(info.finite.inner) and int(new.step) == 0
    half = full_pass(solver, data, state, stop=2)
    new, info = jitted(solver.update)(half, data.batch(0, 0))
    assert not bool(info.finite.inner)
    jax.tree.map(np.testing.assert_array_equal, new, half)


def run_with_passes(solver, data, state, length, seed=0):
    """Whole runs of SRBA and SPABA: scans up to the next pass, then the pass."""
    num_inner, num_outer = len(data.inner_weights), len(data.outer_weights)

    def one(state, key):
        i, j = jax.random.randint(key, (2,), 0, jnp.array([num_inner, num_outer]))
        return solver.update(state, data.batch(i, j))[0]

    def complete(state):
        inner = lambda i, s: solver.refresh(
            s, bf.Batch(data.batch(i, 0).inner, None, jnp.asarray(i, jnp.int32), None)
        )
        outer = lambda j, s: solver.refresh(
            s, bf.Batch(None, data.batch(0, j).outer, None, jnp.asarray(j, jnp.int32))
        )
        return jax.lax.fori_loop(0, num_outer, outer, jax.lax.fori_loop(0, num_inner, inner, state))

    def body(state, key):
        due = solver.next_refresh(state) <= state.step
        return one(jax.lax.cond(due, complete, lambda s: s, state), key), due

    keys = jax.random.split(jax.random.PRNGKey(seed), length)
    return jax.jit(lambda state: jax.lax.scan(body, state, keys))(state)


@pytest.mark.parametrize(
    "method, kwargs",
    [(bf.srba, {"period": 7}), (contrib.spaba, {"probability": 1 / 7})],
    ids=["srba", "spaba"],
)
def test_srba_and_spaba_find_the_solution_with_constant_steps(x64, method, kwargs):
    data = ragged()
    solver = method(
        data.problem, inner=optax.sgd(0.1), outer=optax.sgd(0.03), **counts(data), **kwargs
    )
    state, passes = run_with_passes(
        solver, data, solver.init(data.inner_params, data.outer_params), 6000
    )
    assert float(np.sum(flat(data.grad_h(state.outer_params)) ** 2)) <= 1e-20
    assert int(passes.sum()) == pytest.approx(6000 / 7, abs=1 if method is bf.srba else 80)


def test_spaba_draws_its_passes_from_the_geometric_law_and_the_seed():
    at_once = lambda seed: jax.jit(jax.vmap(geometric_schedule(0.2, seed)))
    steps = jnp.arange(20_000, dtype=jnp.int32)
    waits = np.asarray(at_once(5)(steps)) - np.arange(20_000)
    assert waits.min() == 1
    counted = np.bincount(waits, minlength=6)[1:6] / len(waits)
    np.testing.assert_allclose(counted, 0.2 * 0.8 ** np.arange(5), atol=0.01)
    np.testing.assert_array_equal(at_once(5)(steps[:9]), waits[:9] + np.arange(9))
    other = at_once(6)(steps[:50])
    assert (np.asarray(other) != waits[:50] + np.arange(50)).any()
    assert int(geometric_schedule(1.0, seed=0)(jnp.int32(4))) == 5


# --- the single-level methods inside --------------------------------------------------------------


class Delayed:
    """G = ½‖z - x‖² and unit inner steps: x follows a single-level method on F, two steps late.

    z_{t+1} = x_t, v_{t+1} = -est[∇F_j(z_t)], x_{t+1} = x_t + γ v_t: so x_{t+1} = x_t - γ e_{t-1},
    e_s = est[∇F_{j_s}(x_{s-1})], x_{-1} = z_0 = x_0. `est` is the estimator's part, in NumPy here.
    """

    def __init__(self, num_outer=5, p=3, seed=0):
        rng = np.random.default_rng(seed)
        factors = rng.normal(size=(num_outer, p, p))
        self.hessians = np.einsum("nij,nkj->nik", factors, factors) / p + 0.5 * np.eye(p)
        self.targets = rng.normal(size=(num_outer, p))
        self.start = rng.normal(size=p)
        self.ids = rng.integers(num_outer, size=40)
        self.num_outer, self.step = num_outer, 0.05
        self.problem = bf.Problem(
            lambda z, x, batch: 0.5 * jnp.sum((z - x) ** 2),
            lambda z, x, batch: 0.5 * (z - batch["b"]) @ batch["A"] @ (z - batch["b"]),
        )

    def grad(self, j, x):
        return self.hessians[j] @ (x - self.targets[j])

    def full(self, x):
        return np.mean([self.grad(j, x) for j in range(self.num_outer)], axis=0)

    def outer(self, j):
        return {"A": jnp.asarray(self.hessians)[j], "b": jnp.asarray(self.targets)[j]}

    def iterates(self, estimates):
        """x_t from `estimates(j, x) -> e`, called once a step."""
        x, seen, v = self.start.copy(), self.start.copy(), np.zeros_like(self.start)
        out = []
        for j in self.ids:
            v, x, seen = -estimates(j, seen), x + self.step * v, x
            out.append(x)
        return np.array(out)

    def run(self, solver):
        state = solver.init(jnp.asarray(self.start), jnp.asarray(self.start))
        if int(solver.next_refresh(state)) == 0:
            state = jitted(solver.refresh)(
                state, bf.Batch(inner=jnp.zeros(1), inner_id=jnp.int32(0))
            )
            for j in range(self.num_outer):
                state = jitted(solver.refresh)(
                    state, bf.Batch(outer=self.outer(j), outer_id=jnp.int32(j))
                )
        update, out = jitted(solver.update), []
        for j in self.ids:
            batch = bf.Batch(jnp.zeros(1), self.outer(int(j)), jnp.int32(0), jnp.int32(j))
            state, _ = update(state, batch)
            out.append(np.asarray(state.outer_params))
        return np.array(out)


def test_saba_reduces_to_saga(x64):
    toy = Delayed()
    table = np.zeros((toy.num_outer, 3))

    def saga(j, x):
        new = toy.grad(j, x)
        out = new - table[j] + table.mean(0)
        table[j] = new
        return out

    solver = bf.saba(
        toy.problem,
        inner=optax.sgd(1.0),
        outer=optax.sgd(toy.step),
        num_inner_batches=1,
        num_outer_batches=toy.num_outer,
    )
    np.testing.assert_allclose(toy.run(solver), toy.iterates(saga), rtol=0, atol=1e-12)


def test_srba_reduces_to_sarah(x64):
    toy = Delayed()
    memory = {}

    def sarah(j, x):
        if memory:
            memory["d"] = memory["d"] + toy.grad(j, x) - toy.grad(j, memory["x"])
        else:
            memory["d"] = toy.full(x)
        memory["x"] = x
        return memory["d"]

    solver = bf.srba(
        toy.problem,
        inner=optax.sgd(1.0),
        outer=optax.sgd(toy.step),
        num_inner_batches=1,
        num_outer_batches=toy.num_outer,
        period=1000,
    )
    np.testing.assert_allclose(toy.run(solver), toy.iterates(sarah), rtol=0, atol=1e-12)


# --- momentum -------------------------------------------------------------------------------------


def recorded(solver, data, length=8):
    """Directions that unit steps reveal, and the points they were taken at."""
    state = solver.init(data.inner_params, data.outer_params)
    update, found, points = jitted(solver.update), [], []
    for k in range(length):
        old = state.variables
        state, _ = update(state, data.batch(k % 4, k % 3))
        points.append(old)
        found.append(jax.tree.map(lambda a, b: a - b, old, state.variables))
    return found, points


SMALL = {"inner": optax.sgd(1.0), "outer": optax.sgd(1.0)}


def scaled_problem(data, scale=0.05):
    """The quadratic with small losses, so that unit steps do not blow up."""
    inner, outer = data.problem.inner_loss, data.problem.outer_loss
    return bf.Problem(lambda *a: scale * inner(*a), lambda *a: scale * outer(*a))


@functools.partial(jax.jit, static_argnums=0)
def minibatch_directions(problem, point, batch):
    found = bf.oracles.evaluate(problem, point, batch)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    return bf.Variables(
        found.inner_grad,
        add(found.hvp, found.outer_grad_inner),
        add(found.cross_jvp, found.outer_grad_outer),
    )


@pytest.mark.parametrize("name", ["masoba", "storm", "fsla"])
def test_momentum_follows_its_equation(x64, name):
    data = quadratics()
    problem, share = scaled_problem(data), 0.3
    # A schedule for one of them: both forms of the argument.
    argument = {"masoba": {"theta": share}, "storm": {"eta": lambda step: share}}
    argument = argument.get(name, {"eta": share})
    found, points = recorded(table.method(name)(problem, **SMALL, **argument), data)
    carried = None
    for k, (point, direction) in enumerate(zip(points, found, strict=True)):
        now = flat(minibatch_directions(problem, point, data.batch(k % 4, k % 3)))
        then = flat(minibatch_directions(problem, points[max(k - 1, 0)], data.batch(k % 4, k % 3)))
        p = len(flat(point.inner))
        averaged = {"storm": np.arange(len(now)) >= 0}.get(name, np.arange(len(now)) >= 2 * p)
        if name == "masoba":
            new = share * now + (0 if carried is None else (1 - share) * carried)
        else:
            new = now if carried is None else now + (1 - share) * (carried - then)
        carried = new
        np.testing.assert_allclose(flat(direction), np.where(averaged, new, now), atol=1e-12)


def test_full_share_is_soba(x64):
    data = quadratics()
    problem = scaled_problem(data)
    expected, _ = recorded(bf.soba(problem, **SMALL), data)
    for name, share in (("masoba", {"theta": 1.0}), ("storm", {"eta": 1.0}), ("fsla", {"eta": 1})):
        found, _ = recorded(table.method(name)(problem, **SMALL, **share), data)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(flat(one), flat(other), atol=1e-13)


def test_fsla_pays_for_the_outer_direction_alone_at_the_previous_point():
    """6 units rest on the compiler dropping the rest: its FLOPs lie well below STORM's."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(64, 50)), jnp.float32)
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(jnp.tanh(batch @ z) ** 2) + jnp.sum(jnp.exp(x) * z[:, 0] ** 2),
        lambda z, x, batch: jnp.mean(jnp.tanh(batch @ z)),
    )

    def flops(method):
        solver = method(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        state = solver.init(jnp.ones((50, 40)), jnp.zeros(50))
        step = jax.jit(solver.update).lower(state, bf.Batch(inputs, inputs)).compile()
        return step.cost_analysis()["flops"]

    soba, fsla, storm = flops(bf.soba), flops(contrib.fsla), flops(bf.storm)
    assert soba < fsla < storm
    assert fsla < 1.75 * soba


# --- states, keys, weights, messages --------------------------------------------------------------


def test_stateful_losses_warn_and_keep_their_key_for_each_minibatch():
    def inner_loss(z, x, batch, model_state, rng):
        noise = jax.random.normal(rng, z.shape)
        value = 0.5 * jnp.sum((z - x - noise) ** 2)
        return value, bf.Aux(model_state, {"noise": noise[0]})

    def outer_loss(z, x, batch, model_state, rng):
        return 0.5 * jnp.sum(z**2), bf.Aux(model_state)

    problem = bf.Problem(inner_loss, outer_loss, stateful=True)
    one = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1)}
    sizes = {"num_inner_batches": 2, "num_outer_batches": 2}
    with pytest.warns(UserWarning, match="BatchNorm"):
        solver = bf.saba(problem, **one, **sizes)
    state = solver.init(jnp.zeros(2), jnp.zeros(2), model_state={})
    noises = []
    for i in (0, 1, 0, 1):
        batch = bf.Batch(jnp.zeros(1), jnp.zeros(1), jnp.int32(i), jnp.int32(i))
        state, info = jitted(solver.update)(state, batch)
        noises.append(float(info.metrics["inner_noise"]))
    assert noises[:2] == noises[2:] and noises[0] != noises[1]
    with pytest.warns(UserWarning, match="srba"):
        bf.srba(problem, **one, **sizes, period=2)


def test_an_id_outside_the_partition_stops_the_run():
    data = quadratics()
    solver = bf.saba(data.problem, **ONE, **counts(data, weights=False))
    state = solver.init(data.inner_params, data.outer_params)
    for i, j in ((4, 0), (-1, 0), (0, 3)):
        batch = data.batch(0, 0)._replace(inner_id=jnp.int32(i), outer_id=jnp.int32(j))
        new, info = jitted(solver.update)(state, batch)
        assert not all(bool(flag) for flag in info.finite)
        jax.tree.map(np.testing.assert_array_equal, new, state)


def test_tables_that_do_not_fit_are_refused_with_ways_out(caplog):
    data = quadratics()
    solver = bf.saba(data.problem, **ONE, **counts(data), max_table_bytes=100)
    with pytest.raises(
        ValueError,
        match=r"232 B.*max_table_bytes is 100 B.*bfloat16.*pinned_host.*minibatches.*bf\.srba",
    ):
        solver.init(data.inner_params, data.outer_params)
    with caplog.at_level(logging.INFO, logger="bilevel_flax"):
        bf.saba(data.problem, **ONE, **counts(data)).init(data.inner_params, data.outer_params)
    assert "tables take" in caplog.text
    huge = bf.saba(data.problem, **ONE, num_inner_batches=10**13, num_outer_batches=1)
    with pytest.raises(ValueError, match="the memory at hand"):
        huge.init(data.inner_params, data.outer_params)


def test_bfloat16_tables_take_half_the_space():
    data = quadratics()
    make = lambda dtype: jax.eval_shape(
        bf.saba(data.problem, **ONE, **counts(data), table_dtype=dtype).init,
        data.inner_params,
        data.outer_params,
    )
    size = lambda state: sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state.estimator_state.inner.table)
    )
    assert size(make(None)) == 2 * size(make(jnp.bfloat16))


@pytest.mark.parametrize(
    "method, change, message",
    [
        ("saba", {"num_inner_batches": 0}, "num_inner_batches must be an integer >= 1, got 0"),
        ("saba", {"num_outer_batches": 2.5}, "num_outer_batches must be an integer >= 1, got 2.5"),
        ("saba", {"inner_weights": [0.5, 0.5]}, r"inner_weights has shape \(2,\).*is 4"),
        ("saba", {"init_tables": "full"}, "init_tables='full' is unknown"),
        ("saba", {"table_dtype": jnp.float16}, "table_dtype"),
        ("srba", {"period": 0}, "period must be an integer >= 1, got 0"),
        ("srba", {"outer_weights": [0.5, 0.5]}, r"outer_weights has shape \(2,\).*is 3"),
        ("spaba", {"probability": 0.0}, r"probability must lie in \(0, 1\], got 0.0"),
        ("masoba", {"theta": 0.0}, r"theta must lie in \(0, 1\], got 0.0"),
        ("storm", {"eta": 1.5}, r"eta must lie in \[0, 1\].*got 1.5"),
        ("fsla", {"eta": -0.1}, r"eta must lie in \[0, 1\].*got -0.1"),
    ],
)
def test_bad_arguments_get_one_clear_line(method, change, message):
    data = quadratics()
    sizes = counts(data, weights=False)
    given = {
        "saba": sizes,
        "srba": sizes | {"period": 5},
        "spaba": sizes | {"probability": 0.1},
    }.get(method, {})
    with pytest.raises(ValueError, match=message) as caught:
        table.method(method)(data.problem, **ONE, **(given | change))
    assert "\n" not in str(caught.value)


def test_ids_missing_from_a_batch():
    data = quadratics()
    solver = bf.saba(data.problem, **ONE, **counts(data))
    state = solver.init(data.inner_params, data.outer_params)
    with pytest.raises(ValueError, match=r"batch.inner_id is None, but saba needs"):
        solver.update(state, data.batch(0, 0)._replace(inner_id=None))
