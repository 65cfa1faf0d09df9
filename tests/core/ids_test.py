"""A minibatch's id that points at nothing stops the run and is named, no other's is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf

PROBLEM = bf.Problem(
    lambda z, x, batch: 0.5 * jnp.mean((z - x - batch) ** 2),
    lambda z, x, batch: 0.5 * jnp.mean((z - batch) ** 2),
)
STEPS = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1)}
SHARES = {"inner_weights": [0.25, 0.5, 0.25], "outer_weights": [0.25, 0.75]}
SOLVERS = {
    "saba": bf.saba(PROBLEM, **STEPS, num_inner_batches=3, num_outer_batches=2),
    "soba": bf.soba(PROBLEM, **STEPS, **SHARES),
    "implicit": bf.implicit(PROBLEM, **STEPS, **SHARES, inner_steps=1, adjoint_steps=1),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_an_id_past_the_end_is_named(name):
    solver = SOLVERS[name]
    several = solver.batches != (1, 1)
    start, update = solver.init(jnp.ones(()), jnp.zeros(())), jax.jit(solver.update)

    def batch(i, j):
        ids = [
            jnp.full((count,) if several else (), position, jnp.int32)
            for count, position in zip(solver.batches, (i, j), strict=True)
        ]
        return bf.Batch(*(jnp.ones((*each.shape, 4)) for each in ids), *ids)

    _, info = update(start, batch(2, 1))
    bf.check_finite(info)
    for i, j in ((3, 0), (-1, 0), (0, 2)):
        state, info = update(start, batch(i, j))
        assert not info.ok
        assert not info.finite
        with pytest.raises(FloatingPointError, match=r"batch\.(inner|outer)_id.*outside"):
            bf.check_finite(info)
        jax.tree.map(np.testing.assert_array_equal, state.variables, start.variables)


@pytest.mark.parametrize("side", ["inner", "outer"])
def test_a_loss_that_is_not_finite_is_no_success(side):
    """As that of a label outside the classes: NaN, with finite derivatives."""
    lost = lambda loss: lambda z, x, batch: loss(z, x, batch) + jax.lax.stop_gradient(jnp.log(-1.0))
    losses = {"inner_loss": PROBLEM.inner_loss, "outer_loss": PROBLEM.outer_loss}
    losses[f"{side}_loss"] = lost(losses[f"{side}_loss"])
    solver = bf.soba(bf.Problem(**losses), **STEPS)
    batch = bf.Batch(jnp.ones(4), jnp.ones(4))
    _, info = jax.jit(solver.update)(solver.init(jnp.ones(()), jnp.zeros(())), batch)
    assert info.finite
    assert not info.ok
    with pytest.raises(FloatingPointError, match=f"{side}_loss; likely.*a label outside"):
        bf.check_finite(info)


def test_the_truth_of_finite():
    some = bf.base.Finite(jnp.array(True), jnp.array(False), jnp.array(True))
    assert not some
    assert some._replace(adjoint=jnp.array(True))
    assert not some._replace(adjoint=jnp.array([True, False]))  # of a chunk of steps
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda flags: 1 if flags else 0)(some)


def test_a_pass_of_srba_takes_each_side_in_its_turn():
    """Its sum remembers no minibatch: one of the other side, or of none, spoils it for good."""
    solver = bf.srba(PROBLEM, **STEPS, num_inner_batches=2, num_outer_batches=1, period=5)
    refresh, update = jax.jit(solver.refresh), jax.jit(solver.update)
    data, start = jnp.ones(4), solver.init(jnp.ones(()), jnp.zeros(()))
    inner, outer = (lambda i: bf.Batch(data, None, i)), (lambda j: bf.Batch(None, data, None, j))
    for batches, fine in (
        ([inner(1), inner(0), outer(0)], True),
        ([inner(0), outer(0), inner(1)], False),
        ([inner(0), inner(2), outer(0)], False),
        ([inner(0), inner(1), outer(-1)], False),
    ):
        state = start
        for batch in batches:
            ids = [None if i is None else jnp.int32(i) for i in batch[2:]]
            state = refresh(state, bf.Batch(*batch[:2], *ids))
        assert bool(update(state, bf.Batch(data, data, 0, 0))[1].ok) == fine
