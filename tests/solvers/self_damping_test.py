"""adjoint.self_damped: δ is 0 where Hv is exact, and as large as its noise asks elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf

H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.6]])
G = np.array([1.0, -2.0, 0.5])


def solve(transform, matrices, steps):
    """v and the residuals after `steps` updates with D_v = H_t v + g, H_t = matrices(t)."""

    def body(carry, t):
        v, state = carry
        product = matrices(t) @ v
        residual = jnp.linalg.norm(product + G) / np.linalg.norm(G)
        update, state = transform.update(product + G, state, v, adjoint_residual=residual)
        return (v + update, state), residual

    start = (jnp.zeros(3), transform.init(jnp.zeros(3)))
    return jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(steps)))(start)


def test_an_exact_hessian_ends_at_the_exact_adjoint():
    transform = bf.adjoint.self_damped(optax.sgd(0.2))
    (v, state), _ = solve(transform, lambda t: jnp.asarray(H), 600)
    assert float(jnp.exp(state.log_damping)) < 1e-6
    np.testing.assert_allclose(v, -np.linalg.solve(H, G), atol=1e-5)


def test_noise_of_the_product_is_held_at_the_target():
    def noisy(t):
        noise = jax.random.normal(jax.random.fold_in(jax.random.PRNGKey(0), t), (3, 3))
        return 0.01 * H + 0.3 * (noise + noise.T)

    transform = bf.adjoint.self_damped(optax.sgd(0.02), target=1.1)
    (v, state), residual = solve(transform, noisy, 8000)
    assert 1.05 < float(jnp.exp(jnp.mean(jnp.log(residual[4000:])))) < 1.15
    assert float(jnp.exp(state.log_damping)) > 0.1
    # The direction survives: the damped adjoint is -g/δ here.
    assert float(-(v @ G) / jnp.linalg.norm(v) / np.linalg.norm(G)) > 0.9
    bare = optax.with_extra_args_support(optax.sgd(0.02))
    _, undamped = solve(bare, noisy, 8000)
    assert float(jnp.exp(jnp.mean(jnp.log(undamped[4000:])))) > 2


def test_negative_curvature_cannot_make_v_explode():
    bent = jnp.diag(jnp.array([1.0, 0.5, -0.5]))
    transform = bf.adjoint.self_damped(optax.sgd(0.1), initial=1e-3)
    (v, state), residual = solve(transform, lambda t: bent, 3000)
    assert float(jnp.exp(state.log_damping)) > 0.5  # H + δI is positive
    assert float(jnp.linalg.norm(v)) < 20
    assert float(residual[-1]) < 1.3
    bare = optax.with_extra_args_support(optax.sgd(0.1))
    (free, _), _ = solve(bare, lambda t: bent, 3000)
    assert not float(jnp.linalg.norm(free)) < 1e20


@pytest.mark.parametrize("step", [0.5, 1.9, 5.0, 9.0])
def test_a_long_step_on_a_flat_problem_does_not_run_away(step):
    """Stable for z up to 10; a damping of 1 in units of H made v's step unstable above 1.7."""
    (v, state), residual = solve(
        bf.adjoint.self_damped(optax.sgd(step)), lambda t: 0.2 * jnp.eye(3), 800
    )
    np.testing.assert_allclose(v, -G / 0.2, rtol=1e-4)
    assert float(residual.max()) < 2 and float(state.log_damping) < -10


def test_a_direction_of_zero_leaves_momentum_alone():
    transform = bf.adjoint.self_damped(optax.sgd(0.1, momentum=0.9))
    v, state = jnp.ones(3), transform.init(jnp.ones(3))
    for d_v in (jnp.ones(3), jnp.zeros(3)):
        update, state = transform.update(d_v, state, v, adjoint_residual=jnp.float32(0.5))
    np.testing.assert_allclose(update, -0.09 * jnp.ones(3), rtol=1e-6)


@pytest.mark.parametrize("residual", [np.inf, np.nan])
def test_an_outer_loss_without_gradient_leaves_the_damping(residual):
    transform = bf.adjoint.self_damped(optax.sgd(0.1), initial=0.5)
    state = transform.init(jnp.zeros(3))
    v = jnp.ones(3)
    d_v = jnp.ones(3)
    update, after = transform.update(d_v, state, v, adjoint_residual=jnp.float32(residual))
    assert after.log_damping == state.log_damping
    np.testing.assert_allclose(v + update, (v - 0.1 * d_v) / (1 + 0.1 * 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": 1.0}, "target=1.0 must be > 1"),
        ({"rate": 0.0}, "rate=0.0 must lie in"),
        ({"initial": 0.0}, "initial=0.0 must be > 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bf.adjoint.self_damped(optax.sgd(0.1), **options)


def test_without_a_solver_it_says_what_it_lacks():
    transform = bf.adjoint.self_damped(optax.sgd(0.1))
    with pytest.raises(TypeError, match="adjoint_residual"):
        transform.update(jnp.zeros(3), transform.init(jnp.zeros(3)), jnp.zeros(3))


def test_a_fixed_damping_replaces_it_in_auto():
    problem = bf.Problem(
        inner_loss=lambda z, x, batch: 0.5 * z @ H @ z - z @ x,
        outer_loss=lambda z, x, batch: 0.5 * jnp.sum((z - 1.0) ** 2),
    )
    own = bf.auto(problem, inner=optax.sgd(0.1), steps=10).init(jnp.zeros(3), jnp.zeros(3))
    assert isinstance(own.adjoint_opt_state, bf.adjoint.SelfDampedState)
    fixed = bf.auto(problem, inner=optax.sgd(0.1), steps=10, damping=0.0)
    state = fixed.init(jnp.zeros(3), jnp.zeros(3))
    assert not isinstance(state.adjoint_opt_state, bf.adjoint.SelfDampedState)


@pytest.mark.parametrize("batch, epochs", [(2, 8), (4, 8), (4, 32)])
def test_a_row_travels_as_far_whatever_the_minibatch_and_the_epochs(batch, epochs):
    n, steps = 16, epochs * 16 // batch
    outer = bf.outer.robust_sgd(optax.linear_schedule(2 * 3.0 / steps, 0.0, steps), catch_up=9.0)
    x = jnp.zeros(n)
    state = outer.init(bf.Table(x))
    order = np.random.default_rng(0)
    for _ in range(epochs):
        for index in order.permutation(n).reshape(-1, batch):
            rows = bf.Rows(jnp.asarray(index), jnp.where(jnp.asarray(index) < 8, 1.0, -1.0))
            update, state = outer.update(rows, state, x)
            x = x.at[update.index].add(update.values)
    np.testing.assert_allclose(x[:8], -3.0, rtol=0.25)
    np.testing.assert_allclose(x[8:], 3.0, rtol=0.25)


def test_one_visit_moves_a_row_by_catch_up_at_most():
    outer = bf.outer.robust_sgd(1.0, catch_up=0.7)
    rows = bf.Rows(jnp.array([1, 5]), jnp.array([1.0, -1.0]))
    update, _ = outer.update(rows, outer.init(bf.Table(jnp.zeros(100))), jnp.zeros(100))
    np.testing.assert_allclose(update.values, jnp.array([-0.7, 0.7]), rtol=1e-6)
    with pytest.raises(ValueError, match="catch_up=-1 must be >= 0"):
        bf.outer.robust_sgd(1.0, catch_up=-1)


def test_a_step_that_starts_too_small_grows_with_the_distance_gone_and_never_past_most():
    """Rows whose visits agree catch up with the run that starts right; a larger start is cut."""
    n, batch, epochs = 64, 4, 24
    steps = epochs * n // batch
    right = optax.linear_schedule(2 * 6.0 / steps, 0.0, steps)

    def travelled(start, agree=True, most=right):
        rate = optax.linear_schedule(2 * start / steps, 0.0, steps)
        outer = bf.outer.robust_sgd(rate, catch_up=9.0, max_learning_rate=most)
        x = jnp.full(n, -2.0)
        state = outer.init(bf.Table(x))
        update = jax.jit(outer.update)
        order = np.random.default_rng(0)
        for _ in range(epochs):
            for index in order.permutation(n).reshape(-1, batch):
                signs = np.where(index < 32, 1.0, -1.0) if agree else order.choice([-1, 1], batch)
                rows = bf.Rows(jnp.asarray(index), jnp.asarray(signs, jnp.float32))
                step, state = update(rows, state, x)
                x = x.at[step.index].add(step.values)
        return np.abs(np.asarray(x) + 2.0).mean()

    full = travelled(6.0)
    np.testing.assert_allclose(full, 6.0, rtol=0.1)
    assert travelled(6.0 * 30) == full
    assert travelled(6.0 / 30, most=None) < 0.05 * full
    assert 0.5 * full < travelled(6.0 / 30) < full
    # Where visits contradict each other nothing is to be made up for.
    assert travelled(6.0 / 30, agree=False) < 0.25 * full


def test_the_spread_that_x_starts_with_is_no_distance_gone():
    outer = bf.outer.robust_sgd(0.01, catch_up=9.0, max_learning_rate=1.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=400), jnp.float32)
    index = jnp.arange(400)
    step, _ = outer.update(bf.Rows(index, jnp.ones(400)), outer.init(bf.Table(x)), x)
    np.testing.assert_allclose(step.values, -0.01, rtol=1e-4)


@pytest.mark.parametrize("inner", [optax.adam(0.01), optax.adamw(0.01), optax.sgd(0.2)])
def test_where_h_is_singular_v_keeps_the_digits_that_matter(inner):
    """∇₁F along (1, -1) is out of H's range: v grew along it to 1e5, under Lion to 1e12."""
    problem = bf.Problem(
        lambda z, x, _: 0.5 * (z.sum() - x) ** 2,
        lambda z, x, _: 0.5 * jnp.sum((z - jnp.array([3.0, 1.0])) ** 2),
    )
    solver = bf.auto(problem, inner=inner, steps=3000)
    step = lambda s, _: (solver.update(s, bf.Batch(0.0, 0.0))[0], jnp.abs(s.adjoint).max())
    state = solver.init(jnp.zeros(2), jnp.zeros(()))
    state, lengths = jax.jit(lambda s: jax.lax.scan(step, s, None, length=3000))(state)
    assert abs(float(state.outer_params) - 4.0) < 0.02
    assert float(lengths.max()) < 1e4
