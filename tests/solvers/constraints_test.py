"""Entries of z that a constraint holds are no part of v's system, in every method that has one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.solvers import constraints
from bilevel_flax.solvers.optimiser_probes import coupled_decay

# G = ½ zᵀKz - z·(x a + c), F = ½‖z - t‖²: z₁ is pushed below 0 whatever x.
K = np.array([[1.0, 0.5, 0.1], [0.5, 1.0, 0.4], [0.1, 0.4, 1.0]], np.float32)
A, C, T = np.array([[1.0, 0.5, 2.0], [0.0, -9.0, 0.0], [0.5, 1.0, 0.3]], np.float32)
FREE = np.array([0, 2])
PROBLEM = bf.Problem(
    lambda z, x, _: 0.5 * z @ K @ z - z @ (x * A + C), lambda z, x, _: 0.5 * jnp.sum((z - T) ** 2)
)
THRESHOLD = 0.25


def free_entries(inner, z, d_z=None):
    d_z = jax.tree.map(jnp.ones_like, z) if d_z is None else d_z
    return constraints.free_entries(inner, inner.init(z), z, None, lambda: d_z)


def right(decay=0.0):
    """X where the free entries z = x d are nearest to the target."""
    d = np.linalg.solve((K + decay * np.eye(3))[np.ix_(FREE, FREE)], A[FREE])
    return d @ T[FREE] / (d @ d)


def soft(u, p, amount):
    return jnp.sign(p + u) * jnp.maximum(jnp.abs(p + u) - amount, 0.0) - p


NONNEGATIVE = optax.keep_params_nonnegative()
CLIP = optax.stateless(lambda u, p: jax.tree.map(lambda u, p: jnp.clip(p + u, 0.0, 5.0) - p, u, p))
SOFT = optax.stateless(lambda u, p: jax.tree.map(lambda u, p: soft(u, p, 0.2 * THRESHOLD), u, p))
CHAINS = {
    "soba": (lambda: optax.chain(optax.sgd(0.2), NONNEGATIVE), right()),
    "auto": (lambda: optax.chain(optax.sgd(0.2), CLIP), right()),
    "adam": (lambda: optax.chain(optax.adam(0.05), NONNEGATIVE), right()),
    "gathered": (lambda: optax.MultiSteps(optax.chain(optax.sgd(0.2), NONNEGATIVE), 4), right()),
    "decay": (
        lambda: optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.2), NONNEGATIVE),
        right(decay=0.5),
    ),
    "implicit": (lambda: optax.chain(optax.sgd(0.2), NONNEGATIVE), right()),
    "amigo": (lambda: optax.chain(optax.sgd(0.2), CLIP), right()),
    "unrolled": (lambda: optax.chain(optax.sgd(0.2), NONNEGATIVE), right()),
}


def of_method(name, inner):
    adjoint, outer = optax.sgd(0.2), optax.sgd(0.02)
    if name == "decay":  # without the projection, as the error for a missing adjoint= says
        adjoint = optax.chain(optax.add_decayed_weights(0.5), adjoint)
    return {
        "auto": lambda: bf.auto(PROBLEM, inner=inner, adjoint=adjoint, steps=3000),
        "implicit": lambda: bf.implicit(
            PROBLEM, inner=inner, outer=optax.sgd(0.1), inner_steps=10, adjoint_steps=5
        ),
        "amigo": lambda: bf.amigo(
            PROBLEM, inner=inner, adjoint=adjoint, outer=outer, inner_steps=9, adjoint_steps=9
        ),
        "unrolled": lambda: bf.unrolled(PROBLEM, inner=inner, outer=outer, inner_steps=30),
    }.get(name, lambda: bf.soba(PROBLEM, inner=inner, adjoint=adjoint, outer=outer))()


@pytest.mark.parametrize("name", CHAINS)
def test_what_a_constraint_holds_does_not_answer_to_x(name):
    make, x = CHAINS[name]
    solver = of_method(name, make())
    state = solver.init(jnp.ones(3), jnp.float32(0.5))
    batch = bf.Batch(*(jnp.zeros(count) for count in solver.batches))
    steps = 3000 if solver.batches == (1, 1) else 400
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.update(s, batch), s, None, steps))
    state, info = run(state)
    assert float(state.inner_params[1]) == float(state.adjoint[1]) == 0.0
    np.testing.assert_allclose(state.outer_params, x, atol=2e-3)
    if name != "unrolled":  # it has no residual
        assert float(info.adjoint_residual[-1]) < 1e-2


def test_a_soft_threshold_holds_what_is_at_0():
    """G = ½‖z - x a‖² + .25 |z|₁ by its proximal step: z = x a - .25 where that is above 0."""
    lasso = bf.Problem(
        lambda z, x, _: 0.5 * jnp.sum((z - x * jnp.array([1.0, 0.2, 2.0])) ** 2),
        PROBLEM.outer_loss,
    )
    inner = optax.chain(optax.sgd(0.2), SOFT)
    solver = bf.soba(lasso, inner=inner, adjoint=optax.sgd(0.2), outer=optax.sgd(0.02))
    state = solver.init(jnp.ones(3), jnp.float32(0.5))
    step = lambda s, _: solver.update(s, bf.Batch(0.0, 0.0))
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, 3000))(state)
    x = (0.5 + THRESHOLD + 2 * (0.3 + THRESHOLD)) / 5  # of z₀ = x - .25, z₂ = 2 x - .25
    np.testing.assert_allclose(state.inner_params, [x - THRESHOLD, 0, 2 * x - THRESHOLD], atol=1e-3)
    np.testing.assert_allclose(state.outer_params, x, atol=1e-3)
    assert coupled_decay(inner, inner.init(T), T) is None


def test_at_a_bound_what_is_not_pushed_beyond_it_is_free():
    z, d_z = jnp.zeros(4), jnp.array([1.0, -1.0, 0.0, 1e-30])
    inner = optax.chain(optax.sgd(0.2), NONNEGATIVE)
    assert free_entries(inner, z, d_z).tolist() == [False, True, True, False]
    above = free_entries(optax.chain(optax.adam(0.1), CLIP), 5.0 * jnp.ones(3), d_z[:3])
    assert above.tolist() == [True, False, True]
    # Z = x = 0 is the least of both losses' start: it must leave the bound.
    follow = bf.Problem(
        lambda z, x, _: 0.5 * jnp.sum((z - x) ** 2), lambda z, x, _: 0.5 * jnp.sum((z - 3.0) ** 2)
    )
    solver = bf.soba(follow, inner=inner, adjoint=optax.sgd(0.2), outer=optax.sgd(0.02))
    step = lambda s, _: solver.update(s, bf.Batch(0.0, 0.0))
    run = jax.jit(lambda s: jax.lax.scan(step, s, None, 1000)[0])
    state = run(solver.init(jnp.zeros(2), jnp.float32(0.0)))
    np.testing.assert_allclose(state.outer_params, 3.0, atol=1e-3)


def ball(w):
    return w * jnp.minimum(1.0, 2.0 / jnp.linalg.norm(w))


JOINT = {
    "ball": lambda tree: jax.tree.map(ball, tree),
    "ball of all": lambda tree: optax.projections.projection_l2_ball(tree, 3.0),
    "sphere": lambda tree: jax.tree.map(lambda w: w / jnp.linalg.norm(w), tree),
    "simplex": optax.projections.projection_simplex,
    "rows": lambda tree: jax.tree.map(lambda w: w - w.mean(-1, keepdims=True), tree),
}


@pytest.mark.parametrize("name", JOINT)
def test_a_bound_that_depends_on_other_entries_is_refused(name):
    def project(updates, params):
        moved = JOINT[name](optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, moved, params)

    inner = optax.chain(optax.sgd(0.1), optax.stateless(project))
    z = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="a ball, a sphere or a simplex.*from_condition"):
        free_entries(inner, z)


def test_groups_at_rest_and_entries_at_a_bound_are_both_left_out():
    z = {"a": jnp.zeros(2), "b": jnp.ones(2)}
    d_z = {"a": jnp.array([1.0, -1.0]), "b": jnp.ones(2)}
    flags = {"a": True, "b": False}
    for inner, found in (
        (optax.chain(optax.sgd(0.1), NONNEGATIVE), {"a": [False, True], "b": [False, False]}),
        (optax.sgd(0.1), flags),
    ):
        args = inner, inner.init(z), z, None, lambda: d_z
        left = constraints.without_held(flags, *args)
        assert jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), left) == found


def test_optimisers_without_a_constraint_are_not_asked_for_one():
    z = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    for inner in (optax.sgd(0.1), optax.adamw(0.1), optax.lamb(0.1), optax.contrib.muon(0.1)):
        assert free_entries(inner, z) is None
