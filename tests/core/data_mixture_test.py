"""Mixture weights: their hypergradient in closed form, and draws that change no expectation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel_flax as bf
from bilevel_flax.outer.data_mixture import comb

CENTRES = jnp.array([[1.0, 0.0], [-0.5, 2.0], [0.3, -1.0]])
GOAL = jnp.array([0.2, 0.7])
LOGITS = jnp.array([0.4, -0.3, 0.9])
DOMAIN = jnp.array([0, 1, 2] * 4)


COMB = jax.jit(comb, static_argnums=2)


def losses(z, batch):
    return 0.5 * ((z[None] - CENTRES[batch["domain"]]) ** 2).sum(-1)


def goal_loss(z, x, batch):
    del x, batch
    return 0.5 * ((z - GOAL) ** 2).sum()


def every_draw(weights, count):
    """(probability, offset) pairs: between two break points the comb draws the same."""
    share = np.asarray(weights, np.float64) / np.sum(np.asarray(weights, np.float64))
    cuts = np.unique(np.concatenate([[0.0, 1.0], np.cumsum(share) * count % 1.0]))
    cuts = cuts[np.concatenate([[True], np.diff(cuts) > 1e-6])]
    return [(b - a, (a + b) / 2) for a, b in zip(cuts, [*cuts[1:], 1.0], strict=True)]


def test_mixture_gradient_is_that_of_the_closed_form():
    """For G = Σ p_d ½‖z - c_d‖² and F = ½‖z - t‖²: ∂h/∂x_k = p_k (c_k - z*)ᵀ(z* - t)."""
    mixture = bf.outer.domain_weights(3)
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(mixture.weights(x, batch) * losses(z, batch)), goal_loss
    )
    share = jax.nn.softmax(LOGITS)
    best = share @ CENTRES
    point = bf.Variables(best, GOAL - best, LOGITS)  # H = I
    found = jax.jit(lambda: bf.oracles.evaluate(problem, point, bf.Batch({"domain": DOMAIN}, {})))()
    np.testing.assert_allclose(found.inner_grad, 0, atol=1e-6)
    wanted = share * ((CENTRES - best[None]) @ (best - GOAL))
    np.testing.assert_allclose(found.cross_jvp, wanted, rtol=1e-4, atol=1e-6)
    numeric = jax.jit(jax.grad(lambda x: goal_loss(jax.nn.softmax(x) @ CENTRES, x, {})))(LOGITS)
    np.testing.assert_allclose(found.cross_jvp, numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_selection_is_unbiased_in_value_and_in_every_derivative(count: int):
    mixture = bf.outer.domain_weights(3)
    z, v = jnp.array([0.3, -0.8]), jnp.array([1.3, 0.4])

    def weighted(z, x, batch):
        return jnp.mean(mixture.weights(x, batch) * losses(z, batch))

    def sampled(z, x, offset):
        chosen = comb(offset, mixture.weights(x, {"domain": DOMAIN}), count)
        return jnp.mean(chosen.ratio * losses(z, {"domain": DOMAIN[chosen.index]}))

    def everything(loss):
        gradient = jax.grad(loss, argnums=(0, 1))  # its jvp below: ∇²₁₁ v and ∇²₂₁ v
        directions, products = jax.jvp(lambda z: gradient(z, LOGITS), (z,), (v,))
        return jnp.concatenate([loss(z, LOGITS)[None], *directions, *products])

    wanted = jax.jit(lambda: everything(lambda z, x: weighted(z, x, {"domain": DOMAIN})))()
    draws = every_draw(mixture.weights(LOGITS, {"domain": DOMAIN}), count)
    assert sum(p for p, _ in draws) == pytest.approx(1.0)
    of_a_draw = jax.jit(lambda u: everything(lambda z, x: sampled(z, x, u)))
    each = [of_a_draw(u) for _, u in draws]
    mean = sum(p * values for (p, _), values in zip(draws, each, strict=True))
    np.testing.assert_allclose(mean, wanted, rtol=2e-4, atol=2e-5)
    assert float(np.std([values[0] for values in each])) > 1e-3  # it does draw


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 50, width=32), min_size=2, max_size=12).filter(lambda w: sum(w) > 0.1),
    st.sampled_from((1, 4, 9)),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_candidate_is_drawn_about_as_often_as_its_weight_says(weights, count, offset):
    padded = np.zeros(12, np.float32)  # one shape, one program
    padded[: len(weights)] = weights
    chosen = COMB(offset, padded, count)
    ratio = np.sum(weights) / 12
    times = np.bincount(chosen.index, minlength=12)
    wanted = count * padded / np.sum(weights)
    assert (np.abs(times - wanted) < 1 + 1e-3).all()
    assert not times[padded == 0].any()
    np.testing.assert_allclose(chosen.ratio, ratio, rtol=1e-4)


def test_one_key_one_draw():
    weights = jnp.linspace(0.1, 2.0, 40)
    draws = [bf.outer.select(jax.random.PRNGKey(seed), weights, 8).index for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


def test_domains_start_as_they_come_and_weigh_what_they_lack():
    mixture = bf.outer.domain_weights(3, proposal=(2, 1, 1), temperature=0.5)
    batch = {"domain": jnp.array([0, 0, 1, 2])}
    np.testing.assert_allclose(mixture.weights(mixture.init(), batch), 1.0, rtol=1e-6)
    moved = mixture.weights(LOGITS, batch)
    assert float(moved.mean()) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(moved[0] * 0.5, mixture.shares(LOGITS)[0], rtol=1e-6)


def test_x_counts_from_a_reference():
    mixture = bf.outer.domain_weights(3, proposal=(2, 1, 1), reference=(1, 3, 0))
    np.testing.assert_allclose(mixture.shares(mixture.init()), [0.25, 0.75, 0], atol=1e-6)
    tilted = np.array([1, 3, 0]) * np.exp(LOGITS)
    np.testing.assert_allclose(mixture.shares(LOGITS), tilted / tilted.sum(), atol=1e-6)
    weights = mixture.weights(LOGITS, {"domain": jnp.array([0, 0, 1, 2])})
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-6)
    # What is not read has no slope, and no NaN either.
    slope = jax.jacobian(mixture.shares)(LOGITS)
    assert jnp.isfinite(slope).all()
    assert not slope[2].any()
    assert slope[0].any()


def test_a_network_starts_flat_and_finds_what_its_features_tell():
    """Candidates of centre 1 alone help; feature 1 marks them, whatever their domain."""
    features = lambda batch: jax.nn.one_hot(batch["kind"], 3)
    mixture = bf.outer.network_weights(features, 3, 2, hidden=8)
    kind = jnp.array([0, 1, 2, 1, 0, 2, 1, 0])
    batch = {"kind": kind, "domain": jnp.array([0, 1] * 4)}
    x = mixture.init()
    np.testing.assert_allclose(mixture.weights(x, batch), 1.0, rtol=1e-6)
    np.testing.assert_allclose(mixture.shares(x, batch), 0.5, rtol=1e-6)
    at_the_goal = lambda x: goal_to_centre(x, mixture, batch, kind)
    step = lambda _, x: jax.tree.map(lambda leaf, g: leaf - 0.3 * g, x, jax.grad(at_the_goal)(x))
    x = jax.jit(lambda x: jax.lax.fori_loop(0, 300, step, x))(x)
    weights = mixture.weights(x, batch)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(weights[kind == 1].sum() / weights.sum()) > 0.9
    assert float(mixture.shares(x, batch).sum()) == pytest.approx(1.0, rel=1e-5)


def goal_to_centre(x, mixture, batch, kind):
    best = jnp.mean(mixture.weights(x, batch)[:, None] * CENTRES[kind], axis=0)
    return ((best - CENTRES[1]) ** 2).sum()


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8"])
def test_a_domain_that_there_is_not_makes_its_weight_nan(dtype):
    ids = [0, 2, 3, 255 if dtype == "uint8" else -1]
    batch = {"domain": jnp.array(ids, dtype), "features": jnp.ones((4, 2))}
    by_domain = bf.outer.domain_weights(3)
    net = bf.outer.network_weights(lambda batch: batch["features"], 2, 3)
    weights, shares, slope = jax.jit(
        lambda x: (
            by_domain.weights(x, batch),
            net.shares(net.init(), batch),
            jax.grad(lambda x: by_domain.weights(x, batch)[:2].sum())(x),
        )
    )(LOGITS)
    assert np.isnan(weights).tolist() == [False, False, True, True]
    assert np.isnan(shares).all()
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("kind", ["domain", "network"])
def test_padding_has_no_weight_and_no_say(kind):
    features = jnp.array([[1.0, -1.0], [0.5, 2.0], [0.1, 0.3], [jnp.nan, jnp.inf]])
    domain, mask = jnp.array([2, 0, 1, 99]), jnp.array([1.0, 1.0, 1.0, 0.0])
    if kind == "domain":
        mixture, x = bf.outer.domain_weights(3), LOGITS
    else:
        mixture = bf.outer.network_weights(lambda batch: batch["features"], 2, 3)
        x = mixture.init() | {"last": jnp.linspace(-1.0, 1.0, 32)}
    real = {"features": features[:3], "domain": domain[:3]}
    padded = {"features": features, "domain": domain, "mask": mask}
    each = jnp.array([0.3, 0.7, 0.2, jnp.nan])

    @jax.jit
    def run(batch):
        mask = batch.get("mask")
        values = each[: len(batch["domain"])]
        mean = lambda x: bf.masked_mean(mixture.weights(x, batch) * values, mask)
        return mixture.weights(x, batch), mixture.shares(x, batch), jax.grad(mean)(x)

    (weights, *expected), (found, *others) = run(real), run(padded)
    np.testing.assert_allclose(found, [*weights, 0.0], rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (others, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bf.outer.domain_weights(1), "num_domains must be an integer >= 2"),
        (lambda: bf.outer.domain_weights(2, proposal=(1, 0)), "2 positive numbers"),
        (lambda: bf.outer.domain_weights(2, temperature=0.0), "temperature=0.0"),
        (lambda: bf.outer.domain_weights(2).weights(jnp.zeros(2), {"text": 1}), "domain"),
        (lambda: bf.outer.domain_weights(2, reference=(1, -1)), "must be 2 shares >= 0"),
        (lambda: bf.outer.domain_weights(2, reference=(0, 0)), "not all 0"),
        (lambda: bf.outer.domain_weights(2, reference=(1, 1, 1)), "one for each domain"),
        (lambda: bf.outer.network_weights(len, 3, 2, hidden=0), "hidden must be an integer >= 1"),
        (lambda: bf.outer.network_weights(len, 3, 2).shares({}), "need a batch"),
        (
            lambda: bf.outer.network_weights(lambda _: jnp.ones((4, 2)), 3, 2).weights({}, {}),
            "num_features=3",
        ),
        (
            lambda: bf.outer.select(jax.random.PRNGKey(0), jnp.ones(3), 0),
            "count must be an integer >= 1",
        ),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
