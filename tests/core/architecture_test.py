"""Architecture logits: mixtures, and a temperature that falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
        np.testing.assert_allclose(leaf, 1 / 3, atol=5e-3)
    assert not np.array_equal(x["normal"][:2], x["reduce"])


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
