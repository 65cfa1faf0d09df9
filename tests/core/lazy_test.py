"""Row-sparse optimisers: a row visited k times is where k steps of its own would have put it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import logistic

import bilevel_flax as bf
from bilevel_flax import per_sample as rows
from bilevel_flax.outer import lazy_adam, lazy_sgd

ROWS = 6
SCHEDULE = optax.exponential_decay(0.3, 2, 0.5)
PAIRS = {
    "sgd": (lazy_sgd(0.3), optax.sgd(0.3)),
    "sgd_schedule": (lazy_sgd(SCHEDULE), optax.sgd(SCHEDULE)),
    "adam": (lazy_adam(0.3), optax.adam(0.3)),
    "adam_schedule": (lazy_adam(SCHEDULE), optax.adam(SCHEDULE)),
    "adam_options": (
        lazy_adam(0.3, b1=0.5, b2=0.7, eps=1e-2),
        optax.adam(0.3, b1=0.5, b2=0.7, eps=1e-2),
    ),
}


def start():
    return {
        "w": jnp.linspace(-1, 1, 2 * ROWS).reshape(ROWS, 2),
        "p": jnp.float32(2.0),
        "none": None,
    }


def marked(x):
    return {**x, "w": bf.Table(x["w"])}


def gradients(steps, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(steps, *shape)), jnp.float32)
    return {"w": draw(ROWS, 2), "p": draw(), "none": None}


def run(optimiser, x, opt_state, directions):
    """x after one update for each leading entry of `directions`, compiled as one scan."""

    def body(carry, direction):
        x, opt_state = carry
        updates, opt_state = optimiser.update(direction, opt_state, x)
        return (rows.apply_updates(x, updates), opt_state), None

    return jax.jit(lambda *carry: jax.lax.scan(body, carry, directions)[0])(x, opt_state)


@pytest.mark.parametrize("name", PAIRS)
def test_with_every_row_visited_it_is_the_dense_optimiser(name):
    lazy, dense = PAIRS[name]
    grads = gradients(7)
    order = jnp.stack([jnp.roll(jnp.arange(ROWS)[::-1], k) for k in range(7)])
    visits = {**grads, "w": bf.Rows(order, jax.vmap(lambda g, i: g[i])(grads["w"], order))}
    found, _ = run(lazy, start(), lazy.init(marked(start())), visits)
    expected, _ = run(dense, start(), dense.init(start()), grads)
    assert found["none"] is None
    for leaf in ("w", "p"):
        assert found[leaf].dtype == jnp.float32
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-6, atol=1e-6)


def test_a_row_visited_k_times_is_k_steps_of_adam_on_its_own(x64):
    steps, batch = 12, 2
    rng = np.random.default_rng(3)
    # Row 5 is never visited.
    index = np.stack([rng.permutation(ROWS - 1)[:batch] for _ in range(steps)])
    values = rng.normal(size=(steps, batch))
    lazy = lazy_adam(0.1, b1=0.8, b2=0.95)
    x, state = run(
        lazy,
        jnp.zeros(ROWS),
        lazy.init(bf.Table(jnp.zeros(ROWS))),
        bf.Rows(jnp.asarray(index), jnp.asarray(values)),
    )
    expected = np.zeros(ROWS)
    for row in range(ROWS):
        mean = square = 0.0
        own = [values[t, k] for t in range(steps) for k in range(batch) if index[t, k] == row]
        for t, grad in enumerate(own, 1):
            mean, square = 0.8 * mean + 0.2 * grad, 0.95 * square + 0.05 * grad**2
            expected[row] -= 0.1 * (mean / (1 - 0.8**t)) / (np.sqrt(square / (1 - 0.95**t)) + 1e-8)
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    assert x[5] == 0
    np.testing.assert_array_equal(state.by_row.rows.count, np.bincount(index.ravel(), minlength=6))


def test_rows_that_point_nowhere_touch_nothing():
    lazy = lazy_adam(0.1)
    x = jnp.arange(1.0, ROWS + 1)
    x, state = run(
        lazy, x, lazy.init(bf.Table(x)), bf.Rows(jnp.array([[1, 4]]), jnp.array([[1.0, -1.0]]))
    )
    for nowhere in (ROWS, np.iinfo(np.int32).max):
        direction = bf.Rows(jnp.full((1, 2), nowhere), jnp.full((1, 2), jnp.nan))
        after, state_after = run(lazy, x, state, direction)
        np.testing.assert_array_equal(after, x)
        jax.tree.map(np.testing.assert_array_equal, state_after.by_row, state.by_row)


def test_an_example_twice_in_a_minibatch_is_one_visit_with_the_sum_of_its_gradients():
    lazy = lazy_adam(0.1)
    x = jnp.zeros(ROWS)
    twice = bf.Rows(jnp.array([[3, ROWS, 3, 0]]), jnp.array([[1.0, jnp.nan, 2.0, 5.0]]))
    once = bf.Rows(jnp.array([[0, 3]]), jnp.array([[5.0, 3.0]]))
    found = run(lazy, x, lazy.init(bf.Table(x)), twice)
    expected = run(lazy, x, lazy.init(bf.Table(x)), once)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_schedules_count_steps_and_not_visits():
    # Row 0 is visited in the second step only, when the rate has dropped to zero.
    lazy = lazy_adam(lambda step: jnp.where(step == 0, 0.1, 0.0))
    visits = bf.Rows(jnp.array([[1], [0]]), jnp.ones((2, 1)))
    x, _ = run(lazy, jnp.zeros(2), lazy.init(bf.Table(jnp.zeros(2))), visits)
    np.testing.assert_allclose(x, [0.0, -0.1], rtol=1e-5)


def test_rows_for_a_leaf_without_row_moments_are_refused():
    lazy = lazy_adam(0.1)
    state = lazy.init(jnp.zeros(ROWS))
    with pytest.raises(TypeError, match="bf.Table"):
        lazy.update(bf.Rows(jnp.array([0]), jnp.ones(1)), state)
    with pytest.raises(ValueError, match=r"b2=1\.0"):
        lazy_adam(0.1, b2=1.0)


@functools.cache
def one_epoch():
    """SOBA under lazy_adam: minibatch 1 of the ragged logistic problem, then 0, 1, 2, 3."""
    task = logistic()
    solver = bf.soba(task.problem, inner=optax.sgd(0.1), outer=lazy_adam(0.1))
    step = jax.jit(solver.update)
    state = solver.init(task.inner_params, task.outer_params)
    for i in (1, 0, 1, 2, 3):
        state, _ = step(state, task.batch(i, 0))
    return state, step


def test_in_a_solver_each_row_ages_with_its_own_visits():
    state, _ = one_epoch()
    counts = state.outer_opt_state.by_row["logits"].rows.count
    np.testing.assert_array_equal(counts, [1, 1, 2, 2, 1, 1, 1])
    assert state.outer_opt_state.by_row["penalty"] is None
    assert int(state.outer_opt_state.dense.count) == 5
    # The last two minibatches: their rows have moved by a full step of Adam, once.
    moved = np.abs(state.outer_params["logits"] - logistic().outer_params["logits"])
    np.testing.assert_allclose(moved[4:], 0.1, rtol=1e-3)


def test_a_step_that_is_not_finite_leaves_rows_and_moments_as_they_were():
    state, step = one_epoch()
    batch = logistic().batch(0, 0)
    poisoned = batch._replace(outer={**batch.outer, "inputs": batch.outer["inputs"] * jnp.nan})
    after, info = step(state, poisoned)
    assert (bool(info.finite.inner), bool(info.finite.adjoint)) == (True, False)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("optimiser", [lazy_sgd(0.1), lazy_adam(0.1)], ids=["sgd", "adam"])
def test_a_million_rows_are_never_copied(optimiser):
    num_rows, steps, batch = 1_000_000, 4, 8

    def inner(z, x, data):
        values = jax.nn.sigmoid(x["w"]) * (data["a"] @ z - 1) ** 2
        return bf.masked_mean(values) + jnp.exp(x["p"]) * jnp.sum(z**2)

    problem = bf.Problem(
        inner,
        lambda z, x, data: jnp.mean((data["a"] @ z) ** 2),
        per_sample={"w": True, "p": False},
    )
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optimiser)
    shapes = jax.eval_shape(
        solver.init, jnp.zeros(3), {"w": jnp.zeros(num_rows), "p": jnp.float32(0.0)}
    )
    data = {"a": jnp.ones((steps, batch, 3)), "index": jnp.ones((steps, batch), jnp.int32)}

    def chunk(state, data):
        return jax.lax.scan(lambda s, b: solver.update(s, bf.Batch(b, b)), state, data)

    def one(state, data):
        first = jax.tree.map(lambda leaf: leaf[0], data)
        return solver.update(state, bf.Batch(first, first))

    for function in (chunk, one):
        compiled = jax.jit(function, donate_argnums=0).lower(shapes, data).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * num_rows / 100
