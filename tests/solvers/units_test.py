"""`bf.auto` knows no units: a multiple of F or of G is the same run; x waits for z."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.outer.optimisers.paced import paced
from bilevel_flax.solvers.optimiser_probes import is_linear

N, STEPS = 8, 200
FEATURES = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
TARGETS = (FEATURES @ np.array([1.0, -1.0, 0.5]) + np.where(np.arange(N) < 2, 3.0, 0.0)).astype(
    np.float32
)
# Optimisers of z whose own path does not depend on the scale of G.
SCALE_FREE = {
    "adam": lambda: optax.adam(0.01, eps=1e-30),
    "adamw": lambda: optax.adamw(0.01, eps=1e-30, weight_decay=0.01),
    "lion": lambda: optax.lion(0.003),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.01, eps=1e-30), 2),
}
OTHERS = {
    "sgd": lambda: optax.sgd(0.05, momentum=0.5),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.05)),
}


def ridge(z, x, batch):
    return 0.5 * jnp.mean((batch["a"] @ z - batch["b"]) ** 2) + 0.1 * jnp.exp(x) * jnp.sum(z**2)


def weighted(z, x, batch):
    losses = 0.5 * (batch["a"] @ z - batch["b"]) ** 2
    return jnp.mean(jax.nn.sigmoid(x) * losses) + 0.01 * jnp.sum(z**2)


def outer_loss(z, x, batch):
    return batch["scale"] * 0.5 * jnp.mean((batch["a"] @ z - batch["b"]) ** 2)


@functools.cache
def runner(name, by_row, **settings):
    """`run(scale of F, scale of G)`: x after every step."""
    loss = weighted if by_row else ridge
    problem = bf.Problem(
        lambda z, x, batch: batch["scale"] * loss(z, x, batch), outer_loss, per_sample=by_row
    )
    inner = (SCALE_FREE | OTHERS)[name]()
    solver = bf.auto(problem, inner=inner, steps=STEPS, **settings)
    state = solver.init(jnp.zeros(3), jnp.zeros(N) if by_row else jnp.float32(0.0))

    def step(scales, state, index):
        data = {"a": features[index], "b": targets[index]}
        train = data | {"scale": scales[1], "index": index}
        held = {"a": FEATURES[2:], "b": TARGETS[2:], "scale": scales[0]}
        state, _ = solver.update(state, bf.Batch(train, held))
        return state, state.outer_params

    features, targets = jnp.asarray(FEATURES), jnp.asarray(TARGETS)
    draws = jax.random.randint(jax.random.PRNGKey(0), (STEPS, 4), 0, N)
    return jax.jit(lambda *scales: jax.lax.scan(lambda s, i: step(scales, s, i), state, draws)[1])


@pytest.mark.parametrize("by_row", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("name", SCALE_FREE | OTHERS)
def test_a_multiple_of_a_loss_is_the_same_run(name, by_row):
    run = runner(name, by_row)
    path = run(1.0, 1.0)
    assert np.abs(np.asarray(path[-1] - path[0])).max() > 0.05
    pairs = [(1e-6, 1.0), (1e6, 1.0)]
    pairs += [(1.0, 1e-6), (1.0, 1e6)] if name in SCALE_FREE else []
    for scales in pairs:
        np.testing.assert_allclose(run(*scales), path, rtol=1e-3, atol=1e-3, err_msg=str(scales))


def test_so_it_is_with_cheap_steps():
    run = runner("adam", False, update_every=2, adjoint_update_every=2)
    path = run(1.0, 1.0)
    for scales in ((1e-6, 1.0), (1e6, 1.0), (1.0, 1e-6), (1.0, 1e6)):
        np.testing.assert_allclose(run(*scales), path, rtol=1e-3, atol=1e-3)


FOLLOW = bf.Problem(
    lambda z, x, _: 0.5 * jnp.sum((z - x) ** 2), lambda z, x, _: 0.5 * jnp.sum((z - 3.0) ** 2)
)


@pytest.mark.parametrize(
    "inner, steps, near",
    [
        (optax.adam(1e-3), 20_000, 0.05),
        (optax.adam(optax.linear_schedule(1e-3, 0.0, 20_000)), 20_000, 0.1),
        (optax.adamw(1e-3), 20_000, 0.05),
        (optax.sgd(0.1), 1_000, 0.05),
        (optax.sgd(2e-3), 20_000, 0.1),
    ],
    ids=["adam", "adam that decays", "adamw", "sgd", "slow sgd"],
)
def test_dense_x_waits_for_z_wherever_z_starts(inner, steps, near):
    """Z walks .001 a step under Adam, x could walk .01: it swung to 23 where 3 is right."""
    solver = bf.auto(FOLLOW, inner=inner, steps=steps)

    def step(state, _):
        state, _ = solver.update(state, bf.Batch(0.0, 0.0))
        return state, state.outer_params

    state = solver.init(jnp.zeros(2), jnp.zeros(2))  # the optimum of G: ∇₁G = 0
    state, path = jax.jit(lambda s: jax.lax.scan(step, s, None, length=steps))(state)
    np.testing.assert_allclose(state.outer_params, 3.0, atol=near)
    assert float(path.max()) < 6


DECAYED = optax.chain(optax.add_decayed_weights(0.5, {"a": True, "b": False}), optax.sgd(0.1))


@pytest.mark.parametrize(
    ("inner", "right"),
    [
        (optax.sgd(optax.linear_schedule(0.0, 0.1, 100)), 2.75),
        (optax.partition({"a": optax.sgd(0.1), "b": optax.adam(0.01)}, {"a": "a", "b": "b"}), 2.75),
        (DECAYED, 4.25),
    ],
    ids=["a warm-up", "a slow part", "decay"],
)
def test_x_does_not_wait_for_z_that_has_long_followed(inner, right):
    """Where z's way from its start hid what x had moved, x kept a hundredth of its pace: .75."""
    problem = bf.Problem(
        lambda z, x, _: 0.5 * (z["a"] - x) ** 2 + 0.5 * (z["b"] - 1) ** 2 + 0.5 * z["a"] * z["b"],
        lambda z, x, _: 0.5 * (z["a"] - 3.0) ** 2,
    )
    solver = bf.auto(problem, inner=inner, steps=4000)
    step = lambda s, _: (solver.update(s, bf.Batch(0.0, 0.0))[0], None)
    state = solver.init({"a": jnp.zeros(()), "b": jnp.zeros(())}, jnp.zeros(()))
    state = jax.jit(lambda s: jax.lax.scan(step, s, None, length=4000)[0])(state)
    assert abs(float(state.outer_params) - right) < 0.05


def test_nor_does_it_under_noise():
    """Z comes from 5 by .002 a step; a mean of |⟨v, D_z⟩| would be noise, and x end at 1.2."""
    noisy = lambda about: lambda z, x, e: 0.5 * jnp.sum((z - about(x) - e) ** 2)
    problem = bf.Problem(noisy(lambda x: x), noisy(lambda x: 3.0))
    solver = bf.auto(problem, inner=optax.adam(2e-3), steps=10_000)

    def step(state, key):
        noise = 0.5 * jax.random.normal(key, (2, 2))
        return solver.update(state, bf.Batch(*noise))[0], None

    state, keys = (
        solver.init(jnp.full(2, 5.0), jnp.zeros(2)),
        jax.random.split(jax.random.key(0), 10_000),
    )
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)
    np.testing.assert_allclose(state.outer_params, 3.0, atol=0.15)


# Steps as long as parameters, steps that shrink with what was summed up, nearly linear ones.
NEARLY_LINEAR = {
    "lamb": lambda steps: optax.lamb(optax.cosine_decay_schedule(0.05, steps)),
    "adafactor": lambda steps: optax.adafactor(optax.cosine_decay_schedule(0.05, steps)),
    "adaptive clip": lambda steps: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "block clip": lambda steps: optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)),
    "adagrad": lambda steps: optax.adagrad(optax.cosine_decay_schedule(0.5, steps)),
    "adam": lambda steps: optax.adam(optax.exponential_decay(0.05, steps // 4, 0.1)),
}


@pytest.mark.parametrize("name", NEARLY_LINEAR)
def test_v_follows_to_the_end_of_the_run(name):
    """Z* = x / 2: x = .4. Z's size was near 0 under LAMB, and v, which took its length, stopped."""
    problem = bf.Problem(
        lambda z, x, _: 0.5 * (z - x) ** 2 + 0.5 * z**2, lambda z, x, _: 0.5 * (z - 0.2) ** 2
    )
    solver = bf.auto(problem, inner=NEARLY_LINEAR[name](20_000), steps=20_000)
    step = lambda s, _: (solver.update(s, bf.Batch(0.0, 0.0))[0], None)
    run = jax.jit(lambda s: jax.lax.scan(step, s, None, length=20_000)[0])
    state = run(solver.init(jnp.array(0.0), jnp.array(1.0)))
    assert abs(float(state.outer_params) - 0.4) < 0.06


def test_float16_has_a_first_step_of_v():
    """1e-12 of D_v is no float16: v stayed 0 for a whole run, and x where it was."""
    inner = optax.adam(0.01, eps=1e-3)
    solver = bf.auto(FOLLOW, inner=inner, steps=2000)
    step = lambda s, _: (solver.update(s, bf.Batch(0.0, 0.0))[0], None)
    state = solver.init(jnp.ones(2, jnp.float16), jnp.ones((), jnp.float16))
    state = jax.jit(lambda s: jax.lax.scan(step, s, None, length=2000)[0])(state)
    assert state.outer_params.dtype == jnp.float16
    assert abs(float(state.outer_params) - 3.0) < 0.1


def test_a_step_of_z_that_decays_does_not_slow_v_down():
    """The residual is as it was, the transformation's steps are ten times shorter."""
    schedule = optax.piecewise_constant_schedule(1e-2, {500: 0.1})
    adjoint, v = bf.adjoint.in_own_units(optax.adam(schedule), time_constant=10), jnp.ones(3)
    known = {"adjoint_product": jnp.float32(1.0), "adjoint_residual": jnp.float32(1.0)}

    def body(state, _):
        step, state = adjoint.update(v, state, v, **known)
        return state, jnp.linalg.norm(step)

    lengths = jax.lax.scan(body, adjoint.init(v), None, length=1000)[1]
    np.testing.assert_allclose(lengths[999], lengths[499], rtol=0.05)


def test_the_adjoint_is_solved_whatever_the_scale_of_f():
    a, t = jnp.array([1.0, 2.0, -1.0]), jnp.array([2.0, 1.0, 0.0])
    for scale in (1e-6, 1.0, 1e6):
        problem = bf.Problem(
            lambda z, x, _: 0.5 * jnp.sum((z - x * a) ** 2),
            lambda z, x, _, c=scale: c * 0.5 * jnp.sum((z - t) ** 2),
        )
        inner = optax.adam(optax.linear_schedule(1e-2, 0, 2000))
        solver = bf.auto(problem, inner=inner, outer=optax.set_to_zero(), steps=2000)
        step = lambda s, _, solver=solver: (solver.update(s, bf.Batch(0.0, 0.0))[0], None)
        run = jax.jit(lambda s, step=step: jax.lax.scan(step, s, None, length=2000)[0])
        state = run(solver.init(jnp.zeros(3), jnp.array(1.0)))
        np.testing.assert_allclose(state.adjoint / scale, t - a, atol=0.02)


def test_a_direct_term_of_f_is_not_held_up():
    """X of F alone: z has nothing to follow, and x walks as if z were not there."""
    problem = bf.Problem(
        lambda z, x, _: 0.5 * jnp.sum((z - 1e-6 * x) ** 2),
        lambda z, x, _: 0.5 * (x - 1.0) ** 2 + 0.5 * (z - 3.0) ** 2,
    )
    solver = bf.auto(problem, inner=optax.adam(1e-3), steps=500)
    step = lambda s, _: (solver.update(s, bf.Batch(0.0, 0.0))[0], None)
    state = jax.lax.scan(step, solver.init(jnp.array(0.0), jnp.array(0.0)), None, length=500)[0]
    assert abs(float(state.outer_params) - 1.0) < 0.02


def test_rows_are_not_paced_and_what_is_missing_is_named():
    outer = paced(bf.outer.robust_sgd(0.1))
    table = bf.Table(jnp.zeros(4))
    assert type(outer.init(table)) is type(bf.outer.robust_sgd(0.1).init(table))
    x = jnp.zeros(2)
    with pytest.raises(TypeError, match="lacks adjoint_product, .* outer= of a single-loop solver"):
        outer.update(x, outer.init(x), x)
    with pytest.raises(ValueError, match="time_constant=0 must be >= 1"):
        bf.adjoint.in_own_units(optax.sgd(0.1), time_constant=0)
    with pytest.raises(TypeError, match="lacks adjoint_product"):
        v = bf.adjoint.in_own_units(optax.adam(0.1))
        v.update(x, v.init(x), x)


@pytest.mark.parametrize(
    "make, linear",
    [
        (lambda: optax.sgd(0.1, momentum=0.9, nesterov=True), True),
        (lambda: optax.sgd(optax.warmup_constant_schedule(0.0, 0.1, 5)), True),
        (lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), True),
        (lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1)), False),
        (lambda: optax.adamw(0.1), False),
        (lambda: optax.radam(0.1), False),
        (lambda: optax.contrib.acprop(0.1), False),
        (lambda: optax.adafactor(0.1), False),
        (lambda: optax.contrib.muon(0.1), False),
    ],
)
def test_what_is_linear_in_the_gradient_is_found_out(make, linear):
    assert is_linear(make(), {"w": jnp.zeros((4, 5)), "b": jnp.zeros(5)}) is linear


def test_a_small_f_sets_v_off():
    """1e-12 of a small D_v squared is no float32: v stayed where it was for a whole run."""
    adjoint, v = bf.adjoint.in_own_units(optax.adam(1e-3)), jnp.zeros(4096)
    state, known = adjoint.init(v), {"adjoint_residual": jnp.float32(1.0)}
    for d_v in (jnp.full(4096, 1e-8), jnp.full(4096, 1e-2)):
        step, _ = adjoint.update(d_v, state, v, adjoint_product=jnp.float32(0.0), **known)
        length = float(jnp.linalg.norm(step))
        assert 5e-13 < length < 2e-3 * float(jnp.linalg.norm(d_v))
