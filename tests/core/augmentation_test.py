"""Augmentations: what each operation does, its derivative in the amount, and policies of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax.outer import augmentation
from bilevel_flax.outer.augmentation import operation, pixels

KEY = jax.random.PRNGKey(3)
SIZE = 9


def smooth_images(count: int = 3) -> jax.Array:
    """Blobs, so that finite differences of an interpolation mean something; values in (0, 1)."""
    y, x = np.meshgrid(np.arange(SIZE) - 4.3, np.arange(SIZE) - 3.6, indexing="ij")
    widths = np.arange(3, 3 + count)[:, None, None]
    blobs = 0.1 + 0.73 * np.exp(-(y**2 + 1.7 * x**2 + 0.4 * x * y) / widths)
    return jnp.asarray(blobs[..., None])


def signals(count: int = 2) -> jax.Array:
    time = np.arange(32)
    wave = np.exp(-0.5 * ((time - 14) / 4) ** 2) * np.cos(0.9 * time)
    return jnp.asarray(np.stack([wave * (1 + n) for n in range(count)])[..., None])


@functools.partial(jax.jit, static_argnums=0)
def applied(name: str, amount, examples=None) -> jax.Array:
    """One operation, the same amount for all."""
    if name in augmentation.IMAGE_OPERATIONS:
        examples = smooth_images() if examples is None else examples
        transform = augmentation.transform_images
    else:
        examples = signals() if examples is None else examples
        transform = augmentation.transform_signals
    amounts = {name: jnp.full(len(examples), amount, examples.dtype)}
    return transform(examples, amounts, KEY)


ALL = {**augmentation.IMAGE_OPERATIONS, **augmentation.SIGNAL_OPERATIONS}


def test_an_amount_of_zero_changes_nothing(x64):
    images, waves = jnp.round(255 * smooth_images()) / 255, signals()  # 8 bits, for posterize
    plain = {name: images if name in augmentation.IMAGE_OPERATIONS else waves for name in ALL}
    changed = jax.jit(lambda: {name: applied(name, 0.0, plain[name]) for name in ALL})()
    for name in ALL:
        np.testing.assert_allclose(changed[name], plain[name], atol=1e-12, err_msg=name)


def test_derivatives_are_those_of_finite_differences(x64):
    # At two amounts, off the kinks of interpolations and clips.
    names = sorted(set(ALL) - {"posterize", "solarize"})

    def value(name, amount):
        changed = applied(name, amount).reshape(-1)
        return jnp.vdot(jnp.cos(jnp.arange(changed.size, dtype=float)), changed)

    @jax.jit
    def both(shares):
        found = {}
        for name in names:
            of, amounts = functools.partial(value, name), shares * ALL[name].limit
            step = 1e-6 * ALL[name].limit
            around = jax.vmap(of)(jnp.concatenate([amounts - step, amounts + step]))
            found[name] = jnp.diff(around.reshape(2, -1), axis=0)[0] / (2 * step)
            found[name] = found[name], jax.vmap(jax.grad(of))(amounts)
        return found

    for name, (wanted, slope) in both(jnp.array([0.231, 0.4377])).items():
        np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-7, err_msg=name)
        assert np.abs(wanted).max() > 1e-6, name  # there is something to differentiate


def test_posterize_rounds_and_has_its_surrogates_derivative(x64):
    images = smooth_images()
    np.testing.assert_allclose(applied("posterize", 7.0), jnp.round(images))
    levels = np.unique(np.asarray(applied("posterize", 6.0)))
    np.testing.assert_allclose(3 * levels, np.round(3 * levels), atol=1e-12)

    amount = 5.3
    steps = 2 ** (8 - amount) - 1
    residual = jnp.round(images * steps) - images * steps
    surrogate = lambda a: jnp.sum((images * (2 ** (8 - a) - 1) + residual) / (2 ** (8 - a) - 1))
    found = jax.grad(lambda a: applied("posterize", a).sum())(amount)
    wanted = (surrogate(amount + 1e-5) - surrogate(amount - 1e-5)) / 2e-5
    assert found == pytest.approx(float(wanted), rel=1e-6)
    by_pixel = jax.jit(jax.grad(lambda p: pixels.posterize(p, jnp.full(3, amount)).sum()))(images)
    np.testing.assert_allclose(by_pixel, 1.0)


def test_solarize_inverts_and_has_its_surrogates_derivative(x64):
    images = smooth_images()
    wanted = jnp.where(images > 0.6, 1 - images, images)
    np.testing.assert_allclose(applied("solarize", 0.4), wanted)
    surrogate = lambda a: jnp.sum(
        images + jax.nn.sigmoid((images - 1 + a) / 0.1) * (1 - 2 * images)
    )
    found = jax.grad(lambda a: applied("solarize", a).sum())(0.4)
    assert found == pytest.approx(float(surrogate(0.4 + 1e-6) - surrogate(0.4 - 1e-6)) / 2e-6)


def test_quarter_turns_shifts_and_mirrors_are_exact(x64):
    images = jax.random.uniform(KEY, (2, SIZE, SIZE, 2))
    np.testing.assert_allclose(applied("rotate", 90.0, images), jnp.rot90(images, axes=(1, 2)))
    np.testing.assert_allclose(applied("flip", 1.0, images), images[:, :, ::-1])
    right = applied("translate_x", 2 / SIZE, images)
    np.testing.assert_allclose(right[:, :, 2:], images[:, :, :-2], atol=1e-12)
    np.testing.assert_allclose(right[:, :, :2], 0.0, atol=1e-12)
    down = applied("translate_y", 3 / SIZE, images)
    np.testing.assert_allclose(down[:, 3:], images[:, :-3], atol=1e-12)
    twice = applied("scale", 1.0, images)  # every second pixel of the copy is one of the image
    np.testing.assert_allclose(twice[:, ::2, ::2], images[:, 2:7, 2:7], atol=1e-12)
    sheared = applied("shear_x", 1.0, images)
    np.testing.assert_allclose(sheared[:, 5, 1:], images[:, 5, :-1], atol=1e-12)


def test_signals_shift_in_time_and_frequency(x64):
    wave = signals()
    np.testing.assert_allclose(applied("time_shift", 5 / 32), jnp.roll(wave, 5, axis=1), atol=1e-9)
    tone = jnp.cos(2 * jnp.pi * 4 * jnp.arange(32) / 32)[None, :, None]
    higher = jnp.cos(2 * jnp.pi * 7 * jnp.arange(32) / 32)[None, :, None]
    np.testing.assert_allclose(applied("frequency_shift", 3 / 32, tone), higher, atol=1e-9)
    np.testing.assert_allclose(applied("amplitude", 2.0), 4 * wave)
    np.testing.assert_allclose(applied("sign_flip", 1.0), -wave)


@pytest.mark.parametrize("rows, batch", [(1, 1), (5, 64)])
def test_draws_are_spread_evenly(rows, batch):
    seed = 3
    drawn = np.asarray(operation.spread(jax.random.PRNGKey(seed), rows, batch))
    assert drawn.min() > 0 and drawn.max() < 1
    parts = np.sort(np.floor(drawn * batch).astype(int), axis=1)
    np.testing.assert_array_equal(parts, np.tile(np.arange(batch), (rows, 1)))


def test_hard_draws_are_applied_as_often_as_the_probability_says():
    policy = augmentation.image_policy(("flip", "rotate"), hard=True)
    x = policy.at({"flip": {"probability": 0.3}, "rotate": {"magnitude": 40.0}})
    drawn = operation.draw(KEY, 2, 1000)
    amounts = jax.jit(policy.amounts)(x, drawn)
    assert set(np.unique(amounts["flip"])) == {0.0, 1.0}
    assert float(amounts["flip"].mean()) == pytest.approx(0.3, abs=2e-3)
    rotations = np.asarray(amounts["rotate"])  # uniform in ±40
    assert np.abs(rotations).max() == pytest.approx(40.0, rel=1e-2)
    assert rotations.std() == pytest.approx(40 / np.sqrt(3), rel=1e-2)


def test_a_class_gets_its_own_operations():
    policy = augmentation.signal_policy(("time_shift", "amplitude"), num_classes=2)
    one = {"probability": [1.0, 0.0]}
    x = policy.at(
        {"time_shift": one | {"magnitude": 0.2}, "amplitude": {"probability": [0.0, 1.0]}}
    )
    examples, labels = jnp.asarray(signals(8), jnp.float32), jnp.arange(8) % 2
    changed = jax.jit(policy.apply)(x, examples, KEY, labels)
    # A shift in time changes phases only, an amplitude the height only.
    power = lambda waves: np.abs(np.fft.rfft(np.asarray(waves), axis=1))[:, :-1]
    np.testing.assert_allclose(power(changed[::2]), power(examples[::2]), atol=1e-2)
    assert float(jnp.abs(changed[::2] - examples[::2]).max()) > 0.05
    tall = jnp.abs(examples[1::2]).max(1, keepdims=True)
    factor = jnp.abs(changed[1::2]).max(1, keepdims=True) / tall
    np.testing.assert_allclose(changed[1::2], factor * examples[1::2], atol=1e-2)
    assert float(jnp.abs(factor - 1).min()) > 1e-3


def test_values_go_in_and_out():
    policy = augmentation.image_policy(("rotate", "flip", "noise"), limits={"rotate": 60.0})
    values = {"rotate": {"magnitude": 45.0, "probability": 0.25}, "flip": {"probability": 0.75}}
    found = policy.learned(policy.at(values))
    assert found["rotate"]["magnitude"] == pytest.approx(45.0)
    assert found["rotate"]["probability"] == pytest.approx(0.25)
    assert found["flip"] == {"magnitude": 1.0, "probability": pytest.approx(0.75)}
    assert found["noise"]["probability"] < 1e-5
    assert float(policy.strengths(policy.at(values))["rotate"]) == pytest.approx(0.1875)
    start = policy.learned(policy.init())
    assert start["rotate"] == {"magnitude": pytest.approx(12.0), "probability": pytest.approx(0.5)}


def test_primal_and_tangent_see_the_same_draw(x64):
    """D_x of a solver's oracle is the derivative of ⟨∇₁G, v⟩ with the step's key held fixed."""
    policy = augmentation.image_policy(("rotate", "brightness", "flip"))
    images = smooth_images(6)

    def inner_loss(z, x, batch, model_state, rng):
        changed = policy.apply(x, batch, rng)
        return jnp.mean(jnp.tanh(changed.reshape(6, -1) @ z) ** 2), bf.Aux()

    problem = bf.Problem(inner_loss, lambda z, x, b, s, r: (jnp.sum(z**2), bf.Aux()), stateful=True)
    z, v = jnp.sin(jnp.arange(81.0)), jnp.cos(jnp.arange(81.0))
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), policy.init())
    key = jax.random.PRNGKey(5)

    def slope(angle):
        there = {**x, "rotate": {**x["rotate"], "magnitude": angle}}
        return jax.jvp(lambda z: inner_loss(z, there, images, None, key)[0], (z,), (v,))[1]

    @jax.jit
    def both(angle, step):
        point = bf.Variables(z, v, x)
        found = oracles.evaluate_all(problem, point, bf.Batch(images, images), None, (key, key))
        difference = (slope(angle + step) - slope(angle - step)) / (2 * step)
        return found.oracles.cross_jvp["rotate"]["magnitude"], difference

    found, wanted = both(x["rotate"]["magnitude"], 1e-6)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert abs(float(wanted)) > 1e-6


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: augmentation.image_policy(("rotat",)),
            "'rotat' is unknown.*did you mean 'rotate'",
        ),
        (lambda: augmentation.image_policy(()), "operations is empty"),
        (lambda: augmentation.image_policy(("flip", "flip")), "'flip' occurs 2 times"),
        (lambda: augmentation.image_policy(limits={"rotate": 200.0}), r"must lie in \(0, 180\]"),
        (lambda: augmentation.image_policy(limits={"flip": 0.5}), "no such operation"),
        (lambda: augmentation.image_policy(magnitude=1.5), r"magnitude=1.5 must lie in \(0, 1\)"),
        (lambda: augmentation.image_policy(temperature=0.0), "temperature=0.0 must be > 0"),
        (
            lambda: augmentation.image_policy().at({"rotate": {"magnitude": 100.0}}),
            r"rotate: magnitude=100.0 must lie in \[0, 90\] \(degrees\)",
        ),
        (lambda: augmentation.image_policy(("flip",)).at({"noise": {}}), "'noise' is not in"),
    ],
)
def test_wrong_settings_get_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_wrong_examples_get_one_line():
    policy = augmentation.image_policy(("rotate",), num_classes=3)
    x, labels = policy.init(), jnp.zeros(2, int)
    with pytest.raises(TypeError, match="images: expected floats.*uint8: divide by 255"):
        policy.apply(x, jnp.zeros((2, 8, 8, 1), jnp.uint8), KEY, labels)
    with pytest.raises(
        ValueError, match=r"images: expected \[batch, height.*got shape \(2, 8, 8\)"
    ):
        policy.apply(x, jnp.zeros((2, 8, 8)), KEY, labels)
    with pytest.raises(ValueError, match="labels are missing"):
        policy.apply(x, jnp.zeros((2, 8, 8, 1)), KEY)
    with pytest.raises(ValueError, match=r"labels: expected integers \[2\], got"):
        policy.apply(x, jnp.zeros((2, 8, 8, 1)), KEY, jnp.zeros(3, int))
