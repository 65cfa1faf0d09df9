"""Architecture logits: mixtures, and what is there against the collapse of a search."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.outer import architecture

NAMES = ("none", "skip", "conv")


def test_weights_are_shares_and_start_undecided():
    cells = architecture.mixture({"normal": 3, "reduce": 2}, NAMES)
    x = cells.init(jax.random.key(1))
    weights = cells.weights(x)
    assert {name: leaf.shape for name, leaf in weights.items()} == {
        "normal": (3, 3),
        "reduce": (2, 3),
    }
    for leaf in weights.values():
        np.testing.assert_allclose(leaf.sum(-1), 1, rtol=1e-6)
        assert float(architecture.entropy(leaf)) == pytest.approx(np.log(3), abs=1e-4)
    assert not np.array_equal(x["normal"][:2], x["reduce"])


def test_the_strongest_of_each_edge():
    weights = [[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]]
    assert architecture.strongest(weights, NAMES) == ["none", "skip"]
    assert architecture.strongest(weights, NAMES, ("none",)) == ["conv", "skip"]
    with pytest.raises(ValueError, match="leaves no operation"):
        architecture.strongest(weights, NAMES, NAMES)
    with pytest.raises(ValueError, match="have shape"):
        architecture.strongest(weights, NAMES[:2])


@pytest.mark.parametrize("names", [("conv",), ("conv", "conv")])
def test_operations_have_to_be_a_choice(names):
    with pytest.raises(ValueError, match="two or more, each once"):
        architecture.mixture({"cell": 1}, names)


def test_sharpening_is_a_falling_temperature():
    """x = s(t) y moves as y does under steps that are s(t) times as short, and ends as s·y."""
    sharpness = lambda t: 1.0 + 0.5 * t
    outer = architecture.sharpened(optax.sgd(0.0), sharpness)
    x = start = jnp.array([[0.3, -0.2, 0.1]])
    state = outer.init(x)
    for _ in range(4):
        step, state = outer.update(jnp.ones_like(x), state, x)
        x = optax.apply_updates(x, step)
    np.testing.assert_allclose(x, 3.0 * start, rtol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(x), jax.nn.softmax(start / (1 / 3.0)), rtol=1e-6)


def test_entropy_is_charged_by_its_gradient(x64):
    logits = jnp.array([[0.4, -1.0, 0.2], [2.0, 0.0, 0.0]])
    outer = architecture.with_entropy(optax.sgd(1.0), lambda t: 0.25 * (t + 1))
    step, state = outer.update(jnp.zeros_like(logits), outer.init(logits), logits)
    value = lambda x: float(architecture.entropy(jax.nn.softmax(x, -1)))
    for place in np.ndindex(logits.shape):
        eps = 1e-6
        high, low = (value(logits.at[place].add(sign * eps)) for sign in (1, -1))
        np.testing.assert_allclose(-step[place], 0.25 * (high - low) / (2 * eps), atol=1e-8)
    again, _ = outer.update(jnp.zeros_like(logits), state, logits)
    np.testing.assert_allclose(again, 2 * step)


def test_entropy_decides_where_the_loss_does_not_care():
    """One run, charged or not: only the charged one ends with an operation on each edge."""
    problem = bf.Problem(
        inner_loss=lambda z, x, batch: 0.5 * ((z - jax.nn.softmax(x, -1).sum()) ** 2).sum(),
        outer_loss=lambda z, x, batch: 0.0 * (z.sum() + x.sum()),
    )
    found = {}
    for coefficient in (0.0, 1.0):
        outer = architecture.with_entropy(optax.adam(0.1), coefficient)
        solver = bf.soba(problem, inner=optax.sgd(0.1), outer=outer)
        state = solver.init(jnp.zeros(1), jnp.array([[0.0, 0.1, 0.2]]))
        update = jax.jit(solver.update)
        for _ in range(100):
            state, _ = update(state, bf.Batch(jnp.zeros(1), jnp.zeros(1)))
        found[coefficient] = float(jax.nn.softmax(state.outer_params, -1).max())
    assert found[0.0] < 0.5 and found[1.0] > 0.95


def test_selection_by_perturbation_asks_the_network_not_the_weights():
    """The largest weight is an operation that nobody needs."""
    weights = np.array([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]], np.float32)
    needed = np.array([[0.0, 0.1, 0.9], [0.0, 0.5, 0.2]])
    calls = []

    def score(mixture):
        np.testing.assert_allclose(mixture.sum(-1), 1, rtol=1e-5)
        calls.append(mixture)
        return float((needed * (mixture > 0)).sum())

    assert architecture.strongest(weights, NAMES) == ["skip", "skip"]
    assert architecture.select_by_perturbation(score, weights, NAMES) == ["conv", "skip"]
    assert len(calls) == 6
    # The edge with the most one-sided weights is decided first, and stays so.
    assert all((mixture[1] == [0, 1, 0]).all() for mixture in calls[3:])


def test_stopping_before_a_signal_rises():
    fall, rise = np.linspace(2, 1, 50), np.linspace(1, 3, 50)
    signal = np.concatenate([fall, rise])
    stop = architecture.stop_before_rise(signal, window=5, ratio=1.3)
    assert 50 <= stop < 75
    assert signal[stop - 4 : stop + 1].mean() <= 1.3 * 1.05
    assert architecture.stop_before_rise(fall, window=5) == 49
    noisy = fall + 0.05 * np.random.default_rng(0).normal(size=50)
    assert architecture.stop_before_rise(noisy, window=10) == 49
    with pytest.raises(ValueError, match="ratio"):
        architecture.stop_before_rise(fall, window=5, ratio=1.0)
