"""`solvers.on_rows`: which rows move, what they start from, and that D_x is that of all of z."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.solvers import on_rows

ROWS = 5


def real(batch, values):
    return jnp.sum(values * batch["curvature"] * batch.get("mask", jnp.ones(len(values)))[:, None])


PROBLEM = bf.Problem(
    lambda z, x, batch: 0.5 * real(batch, (z[batch["row"]] - jnp.sin(x)[None]) ** 2),
    lambda z, x, batch: 0.5 * real(batch, (z[batch["row"]] - 1) ** 2) + 0.1 * jnp.sum(x**2),
)
SGD: dict[str, Any] = {"inner": optax.sgd(0.5), "outer": optax.sgd(0.1)}
BATCH = {"row": jnp.array([3, 1]), "curvature": jnp.array([[1.0], [0.7]])}
X = jnp.array([0.4, -1.0])


def started(solver, rows, dtype="float32"):
    z = jnp.arange(2.0 * rows, dtype=dtype).reshape(rows, 2)
    return solver.init(z, X).replace(adjoint=-0.1 * z)


def test_a_step_is_the_one_on_all_of_z():
    plain = bf.soba(PROBLEM, **SGD)
    both = [
        jax.jit(solver.update)(started(solver, ROWS), bf.Batch(BATCH, BATCH))[0]
        for solver in (plain, on_rows(plain, "row"))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *both)
    found, before = both[1].inner_params, started(plain, ROWS).inner_params
    assert np.all(found == before, -1).tolist() == [True, False, True, False, True]


def test_padding_does_not_race_with_the_row_that_it_repeats():
    solver = on_rows(bf.soba(PROBLEM, **SGD), "row")
    update = jax.jit(solver.update)
    found = []
    for order in ([0, 1, 2], [2, 1, 0]):
        order = jnp.array(order)
        batch = {
            "row": jnp.array([3, 1, 3])[order],
            "curvature": jnp.array([[1.0], [0.7], [0.5]])[order],
            "mask": jnp.array([1.0, 1.0, 0.0])[order],
        }
        found.append(update(started(solver, ROWS), bf.Batch(batch, batch))[0])
    for name in ("inner_params", "adjoint"):
        np.testing.assert_allclose(getattr(found[0], name), getattr(found[1], name), rtol=1e-6)
    assert np.any(found[0].inner_params[3] != started(solver, ROWS).inner_params[3])


def test_short_rows_are_computed_with_in_float32():
    solver = on_rows(bf.soba(PROBLEM, **SGD), "row")
    update = jax.jit(solver.update)
    long, short = (
        update(started(solver, ROWS, dtype), bf.Batch(BATCH, BATCH))[0]
        for dtype in ("float32", "float16")
    )
    assert short.inner_params.dtype == short.adjoint.dtype == jnp.float16
    np.testing.assert_array_equal(short.inner_params, long.inner_params.astype(jnp.float16))
    assert short.outer_params.dtype == jnp.float32


def test_fresh_rows_start_at_zero_and_see_one_minibatch():
    implicit = bf.implicit(PROBLEM, **SGD, inner_steps=3, adjoint_steps=2)
    solver = on_rows(implicit, "row", recurring=False)
    assert solver.batches == (1, 1)
    state = started(solver, 2)
    new, info = jax.jit(solver.update)(state, bf.Batch(BATCH, BATCH))
    repeated = {name: jnp.broadcast_to(leaf, (4, *leaf.shape)) for name, leaf in BATCH.items()}
    at = repeated | {"row": jnp.broadcast_to(jnp.arange(2), (4, 2))}
    one = jax.tree.map(lambda leaf: leaf[:1], at)
    zero = state.replace(inner_params=jnp.zeros((2, 2)), adjoint=jnp.zeros((2, 2)))
    wanted, _ = jax.jit(implicit.update)(zero, bf.Batch(at, one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, wanted)
    assert info.ok


@pytest.mark.parametrize(
    "make",
    [
        lambda: bf.soba(PROBLEM, inner=optax.adam(0.1), outer=optax.sgd(0.1)),
        lambda: bf.storm(PROBLEM, **SGD),
    ],
)
def test_what_remembers_rows_is_refused(make):
    solver = make()
    with pytest.raises(ValueError, match=f"on_rows: {solver.name}.*inner=optax.sgd"):
        on_rows(solver, "row").init(jnp.zeros((ROWS, 2)), X)


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_rows_that_there_are_not_stop_the_run(dtype):
    """The last row was taken for another, and of two equal ones either was written."""
    solver = on_rows(bf.soba(PROBLEM, **SGD), "row")
    start, update = started(solver, ROWS), jax.jit(solver.update)
    for rows, mask, fine in (
        ([3, 1], [1.0, 1.0], True),
        ([3, 5], [1.0, 1.0], False),
        ([255, 1], [1.0, 1.0], False),
        ([3, 3], [1.0, 1.0], False),
        ([3, 3], [1.0, 0.0], True),
        ([3, 99], [1.0, 0.0], True),
        ([99, 3], [1.0, 0.0], False),
    ):
        index = jnp.array(rows).astype("int8" if dtype == "int32" else dtype).astype(dtype)
        batch = BATCH | {"row": index, "mask": jnp.array(mask)}  # 255 is -1 there
        state, info = update(start, bf.Batch(batch, batch))
        assert bool(info.ok) == fine
        moved = np.any(state.inner_params != start.inner_params, -1).nonzero()[0].tolist()
        real = [row for row, one in zip(rows, mask, strict=True) if one]
        assert moved == (sorted(real) if fine else [])


@pytest.mark.parametrize(
    ("rows", "words"),
    [(None, "got None"), (jnp.array(1), r"got \(\)"), (jnp.ones(2), "must be integers, got float")],
)
def test_a_minibatch_without_positions_is_refused(rows, words):
    solver = on_rows(bf.soba(PROBLEM, **SGD), "row")
    batch = bf.Batch(BATCH, BATCH | {"row": rows})
    with pytest.raises(ValueError, match=r"batch.outer\['row'\].*" + words):
        solver.update(started(solver, ROWS), batch)
