"""SABA's tables in the host's memory: the same iterates, and only rows that cross."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import logistic

import bilevel_flax as bf
from bilevel_flax.checkpoints.checkpointer import Checkpointer
from bilevel_flax.solvers.memory import tables

OPTIMISERS = {"inner": optax.sgd(0.3), "outer": optax.sgd(0.5)}
COUNTS = {"num_inner_batches": 4, "num_outer_batches": 3}


def solver_of(data, memory, **more):
    return bf.saba(data.problem, **OPTIMISERS, **COUNTS, table_placement=memory, **more)


def scan(solver, data, length=12):
    def body(state, key):
        i, j = jax.random.randint(key, (2,), 0, jnp.array([4, 3]))
        return solver.update(state, data.batch(i, j))[0], None

    keys = jax.random.split(jax.random.PRNGKey(0), length)
    return lambda state: jax.lax.scan(body, state, keys)[0]


def kinds(state):
    memory = state.estimator_state
    return {
        leaf.sharding.memory_kind
        for leaf in jax.tree.leaves((memory.inner.table, memory.outer.table))
    }


def crossings(jaxpr):
    """Shapes of all that moves from one memory to the other, in a jaxpr and those inside it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put":
            found += [(var.aval.shape, equation.params["devices"]) for var in equation.invars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += crossings(inner) if hasattr(inner, "eqns") else []
    return found


needs_host_memory = pytest.mark.skipif(
    tables.HOST not in tables.memory_kinds(), reason="JAX's device reaches no pinned_host memory"
)


@needs_host_memory
def test_tables_on_the_host_give_the_same_bits_and_stay_there(tmp_path):
    data = logistic()
    start = data.inner_params, data.outer_params
    near, far = (solver_of(data, memory) for memory in tables.MEMORIES)
    state = far.init(*start)
    assert kinds(state) == {tables.HOST}
    step = jax.jit(scan(far, data), donate_argnums=0)
    with Checkpointer(tmp_path, asynchronous=False) as checkpointer:
        checkpointer.save(0, state, {})
        restored = checkpointer.restore(far.init(*start)).state
    assert kinds(restored) == {tables.HOST}
    ended = step(restored)
    assert kinds(ended) == {tables.HOST}
    expected = jax.jit(scan(near, data))(near.init(*start))
    assert kinds(expected) == {tables.DEVICE}
    jax.tree.map(np.testing.assert_array_equal, ended, expected)


@needs_host_memory
def test_only_the_visited_rows_cross():
    data = logistic()
    solver = solver_of(data, tables.HOST, table_dtype=jnp.bfloat16)
    state = solver.init(data.inner_params, data.outer_params)
    batch = data.batch(1, 2)
    moved = crossings(jax.make_jaxpr(solver.update)(state, batch).jaxpr)
    memory = state.estimator_state
    shapes = [leaf.shape for leaf in jax.tree.leaves((memory.inner.table, memory.outer.table))]
    one_row = sorted((1, *shape[1:]) for shape in shapes)
    for space in (jax.memory.Space.Host, jax.memory.Space.Device):
        assert sorted(shape for shape, spaces in moved if space in spaces) == one_row
    # What a TPU's compiler is handed: slices of the table move, never the table.
    text = jax.jit(solver.update).trace(state, batch).lower(lowering_platforms=("tpu",)).as_text()
    placed = re.findall(r"@annotate_device_placement\(.*?: \(tensor<([^>]*)>\)", text)
    assert len(placed) == 2 * len(shapes)
    assert all(found.startswith("1x") for found in placed), placed


def test_a_memory_that_is_not_there_is_named(monkeypatch):
    data = logistic()
    with pytest.raises(ValueError, match=r"table_placement='host' is unknown.*pinned_host"):
        solver_of(data, "host")
    monkeypatch.setattr(tables, "memory_kinds", lambda: ["device", "unpinned_host"])
    with pytest.raises(ValueError, match=r"reaches only device, unpinned_host.*bfloat16"):
        solver_of(data, tables.HOST).init(data.inner_params, data.outer_params)
