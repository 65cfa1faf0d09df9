"""Several goals: one adjoint serves them all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import oracles

TARGETS = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([4.0, 2.0])}
error = lambda z, x, batch: jnp.mean((z - batch) ** 2)
inner = lambda z, x, batch: jnp.mean(jnp.exp(x) * (z - batch) ** 2)
POINT = bf.Variables(jnp.float64(0.5), jnp.float64(0.7), jnp.float64(0.2))


def quantities(outer):
    problem = bf.Problem(inner, outer)
    at = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), POINT)
    return oracles.evaluate(problem, at, bf.Batch(jnp.ones(2), TARGETS))


def of(name):
    return quantities(lambda z, x, batch: error(z, x, batch[name])).outer_grad_inner


def test_the_gradient_is_the_weighted_sum_of_the_goals(x64):
    found = quantities(bf.outer.goals({"a": error, "b": error}, {"a": 3, "b": 1}))
    np.testing.assert_allclose(found.outer_grad_inner, 0.75 * of("a") + 0.25 * of("b"))
    equal = quantities(bf.outer.goals({"a": error, "b": error}))
    np.testing.assert_allclose(equal.outer_grad_inner, (of("a") + of("b")) / 2)


def test_what_is_good_enough_no_longer_pulls_and_the_worst_pulls_most(x64):
    both = {"a": error, "b": error}
    values = {name: float(error(0.5, None, TARGETS[name])) for name in both}
    floored = bf.outer.goals(both, floors={"a": values["a"] + 1})
    np.testing.assert_allclose(quantities(floored).outer_grad_inner, of("b") / 2)
    soft = bf.outer.goals(both, temperature=2.0)
    share = np.exp(np.array(list(values.values())) / 2)
    share /= share.sum()
    found = quantities(soft).outer_grad_inner
    np.testing.assert_allclose(found, share @ np.array([of("a"), of("b")]))
    hard = bf.outer.goals(both, temperature=0.01)
    np.testing.assert_allclose(quantities(hard).outer_grad_inner, of("b"), rtol=1e-6)


def test_stateful_goals_are_reported_each():
    def loss(z, x, batch, model_state, rng):
        return error(z, x, batch), bf.Aux(model_state, {"seen": jnp.mean(batch)})

    call = bf.outer.goals({"a": loss, "b": loss}, stateful=True)
    value, aux = call(jnp.float32(0.5), None, TARGETS, {"s": 1}, None)
    assert aux.model_state == {"s": 1}
    assert set(aux.metrics) == {"a", "b", "a_seen", "b_seen"}
    assert float(value) == pytest.approx(float(aux.metrics["a"] + aux.metrics["b"]) / 2)


def test_mistakes_are_told_in_one_line():
    both = {"a": error, "b": error}
    for arguments, says in (
        (({},), "name at least one goal"),
        (([error, error],), r"losses=\[.*must be a mapping"),
        (({"a": 3},), r"losses\['a'\] must be a function, got 3"),
        ((both, {"a": 1.0}), "use the same names"),
        ((both, [1, 2]), r"weights=\[1, 2\] must be a mapping"),
        ((both, {"a": 1.0, "b": 0.0}), r"weights\['b'\] must be a positive number"),
        ((both, {"a": 1.0, "b": optax.constant_schedule(1.0)}), "must be a positive number"),
    ):
        with pytest.raises(ValueError, match=says):
            bf.outer.goals(*arguments)
    for settings, says in (
        ({"temperature": 0.0}, "temperature must be a positive number, got 0"),
        ({"temperature": float("nan")}, "temperature must be a positive number, got nan"),
        ({"floors": 0.5}, "floors=0.5 must be a mapping"),
        ({"floors": {"c": 0.5}}, "use the same names"),
        ({"floors": {"a": float("nan")}}, r"floors\['a'\] must be a finite number, got nan"),
        ({"floors": {"a": None}}, r"floors\['a'\] must be a finite number, got None"),
    ):
        with pytest.raises(ValueError, match=says):
            bf.outer.goals(both, **settings)
    with pytest.raises(ValueError, match="goal 'b' needs a minibatch of that name"):
        bf.outer.goals(both)(0.0, None, {"a": TARGETS["a"]})
    padded = {"a": {"x": jnp.ones(2), "mask": jnp.ones(2)}}
    with pytest.raises(ValueError, match="is padded"):
        bf.outer.goals({"a": error})(0.0, None, padded)
    problem = bf.Problem(inner, bf.outer.goals(both, temperature=1.0))
    with pytest.raises(ValueError, match="no mean over parts of a minibatch"):
        oracles.microbatched(problem, 2)
    oracles.microbatched(bf.Problem(inner, bf.outer.goals(both)), 2)
