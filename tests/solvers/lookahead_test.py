"""`optax.lookahead` is Optax's own loop over both copies; losses, v and x follow the fast one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.solvers.lookahead import slow_params

A, T = jnp.array([1.0, -0.5, 2.0]), jnp.array([2.0, 1.0, 0.5])
# z* = x a / 2, where the decay in G is 1; v* = (t - z) / 2.
PROBLEM = bf.Problem(
    lambda z, x, _: 0.5 * jnp.sum((z["w"] - x * A) ** 2) + 0.5 * jnp.sum(z["w"] ** 2),
    lambda z, x, _: 0.5 * jnp.sum((z["w"] - T) ** 2),
)
BATCH = bf.Batch(0.0, 0.0)
START = {"w": jnp.array([0.3, 0.1, -0.2]), "count": jnp.int32(3)}


def lookahead(fast, period=3, share=0.5):
    return optax.lookahead(fast, period, share)


FAST = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum, reset": lambda: optax.sgd(0.05, momentum=0.9),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),  # v is handed no parameters
}


@pytest.mark.parametrize(
    ("name", "pair"), [("sgd", True), ("momentum, reset", False), ("adamw", True)]
)
def test_it_is_optaxs_own_loop(name, pair):
    fast, floats = FAST[name](), {"w": START["w"]}
    tx = optax.lookahead(fast, 3, 0.5, reset_state=name == "momentum, reset")
    slow = jax.tree.map(lambda leaf: leaf + 1 if pair else leaf, floats)
    start = optax.LookaheadParams(START, START | slow) if pair else START
    solver = bf.soba(PROBLEM, inner=tx, outer=optax.sgd(0.1))
    state = solver.init(start, jnp.float32(1.0))

    def directions(z, v, x):
        grad = 2 * z - x * A
        return grad, 2 * v + z - T, -jnp.sum(A * v)

    z = optax.LookaheadParams(floats["w"], slow["w"])
    v = optax.LookaheadParams.init_synced(jnp.zeros(3))
    x, z_state = 1.0, tx.init(z)
    # Decay behind Adam is none of v's business.
    v_tx = optax.lookahead(optax.adam(0.05), 3, 0.5) if name == "adamw" else tx
    v_state = v_tx.init(v)
    update = jax.jit(solver.update)
    for _ in range(7):
        d_z, d_v, d_x = directions(z.fast, v.fast, x)
        u_z, z_state = tx.update(d_z, z_state, z)
        u_v, v_state = v_tx.update(d_v, v_state, v)
        z, v, x = optax.apply_updates(z, u_z), optax.apply_updates(v, u_v), x - 0.1 * d_x
        state, _ = update(state, BATCH)
        near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        near(state.inner_params["w"], z.fast)
        near(slow_params(state.inner_params, state.inner_opt_state)["w"], z.slow)
        near(state.adjoint["w"], v.fast)
        near(state.outer_params, x)
    assert int(slow_params(state.inner_params, state.inner_opt_state)["count"]) == 3


MADE = {
    "auto": lambda inner, outer: bf.auto(PROBLEM, inner=inner, outer=outer, steps=3000),
    "in a chain": lambda inner, outer: bf.soba(
        PROBLEM, inner=optax.chain(optax.clip_by_global_norm(1e3), inner), outer=outer
    ),
    "of x": lambda inner, outer: bf.soba(PROBLEM, inner=optax.sgd(0.1), outer=lookahead(outer)),
    "implicit": lambda inner, outer: bf.implicit(
        PROBLEM, inner=inner, outer=outer, inner_steps=9, adjoint_steps=5
    ),
    "gathered": lambda inner, outer: bf.soba(
        PROBLEM, inner=lookahead(optax.MultiSteps(optax.sgd(0.2), 2)), outer=outer
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_x_ends_where_it_should(name):
    """F is lowest where z* = x a / 2 is nearest to t."""
    right = float(2 * jnp.vdot(A, T) / jnp.vdot(A, A))
    solver = MADE[name](lookahead(optax.sgd(0.2)), optax.sgd(0.05))
    batch = bf.Batch(jnp.zeros(10), jnp.zeros(1)) if name == "implicit" else BATCH
    state, _ = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: solver.update(s, batch), s, None, length=3000)
    )(solver.init(START, jnp.float32(0.0)))
    np.testing.assert_allclose(state.outer_params, right, atol=1e-3)


@pytest.mark.parametrize(
    "inner",
    [
        optax.MultiSteps(lookahead(optax.sgd(0.1)), 2),
        optax.apply_if_finite(lookahead(optax.sgd(0.1)), 3),
        optax.chain(lookahead(optax.sgd(0.1)), optax.scale(0.5)),
        lookahead(lookahead(optax.sgd(0.1))),
    ],
)
def test_what_does_not_know_of_the_two_copies_is_refused(inner):
    solver = bf.soba(PROBLEM, inner=inner, outer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"optax.lookahead keeps two copies.*put it outermost"):
        solver.init(START, jnp.float32(0.0))


def test_a_pair_without_lookahead_is_refused():
    solver = bf.soba(PROBLEM, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"inner_params=optax.LookaheadParams.*inner_params.fast"):
        solver.init(optax.LookaheadParams.init_synced(START), jnp.float32(0.0))
    with pytest.raises(ValueError, match=r"opt_state is tuple, not that of optax.lookahead"):
        slow_params(START, (optax.EmptyState(),))
