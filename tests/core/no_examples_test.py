"""Minibatches of padding alone, of nothing at all, and masks of any dtype: right, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import oracles, outer
from bilevel_flax.minibatches import counted, example_mask

N, B = 9, 4
DATA = {
    "a": jnp.linspace(-1.0, 2.0, 3 * B).reshape(B, 3),
    "y": jnp.array([1.0, 0.0, 0.0, 1.0]),
    "index": jnp.array([4, 0, 8, 3]),
    "domain": jnp.array([1, 0, 2, 1]),
}
Z = jnp.array([0.3, -0.2, 0.5])


@pytest.mark.parametrize(
    "dtype", [bool, np.uint8, np.int8, np.uint16, np.int32, jnp.bfloat16, jnp.float16, np.float32]
)
def test_a_mask_counts_as_far_as_there_are_examples(dtype):
    """In bools their number is True, in bytes 301 is 45, in bfloat16 300."""
    mask, values = np.ones(400, dtype), np.arange(400.0)
    mask[301:] = 0
    assert float(bf.masked_mean(jnp.asarray(values, jnp.float32), jnp.asarray(mask))) == 150
    assert float(counted(mask).sum()) == 301


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int32, np.uint32])
def test_the_mean_of_what_is_no_float(dtype):
    """The share of right predictions, say."""
    right = (np.arange(400) % 3 == 0).astype(dtype)
    for mask in (np.ones(400, bool), np.ones(400, np.float32)):
        mask[300:] = 0
        found = jax.jit(bf.masked_mean)(jnp.asarray(right), jnp.asarray(mask))
        assert found.dtype == jnp.float32
        assert float(found) == pytest.approx(1 / 3)
        weighted = bf.masked_mean(jnp.asarray(right), jnp.asarray(mask) * jnp.float32(0.25))
        assert float(weighted) == pytest.approx(1 / 3)


def test_negative_marks_are_padding_and_nan_is_none():
    values = jnp.array([1.0, 3.0, 100.0])
    assert float(bf.masked_mean(values, jnp.array([1.0, 1.0, -1.0]))) == 2
    assert float(bf.masked_mean(values, jnp.array([1, 1, -1]))) == 2
    assert np.isnan(bf.masked_mean(values, jnp.array([1.0, 1.0, jnp.nan])))
    short = bf.masked_mean(values.astype(jnp.bfloat16), jnp.array([1, 1, 0]))
    assert short.dtype == jnp.bfloat16 and float(short) == 2


def test_arrays_of_another_length_do_not_name_the_examples():
    classes, mask = jnp.ones(10), jnp.array([1.0, 1.0, 1.0, 0.0])
    assert example_mask({**DATA, "of_classes": classes, "mask": mask}) is not None
    features = {"a": DATA["a"], "y": DATA["y"], "scale": jnp.ones(3)}
    assert example_mask({**features, "mask": jnp.ones(3)}) is None  # of features
    two = {"a": DATA["a"], "scale": jnp.ones(3)}
    for length in (3, 4):
        with pytest.raises(ValueError, match=rf'"mask"\] has {length} entries.*"example_mask"'):
            example_mask({**two, "mask": jnp.ones(length)})
        assert example_mask({**two, "example_mask": jnp.ones(length)}) is not None


def errors(z, batch):
    return jnp.log1p(jnp.exp((1 - 2 * batch["y"]) * (batch["a"] @ z)))


def mean(z, x, batch):
    return bf.masked_mean(errors(z, batch), batch.get("mask"))


def by(weights):
    return lambda z, x, batch: bf.masked_mean(
        weights.apply(x, batch, errors(z, batch)) * errors(z, batch), batch.get("mask")
    )


def by_mixture(mixture):
    return lambda z, x, batch: bf.masked_mean(
        mixture.weights(x, batch) * errors(z, batch), batch.get("mask")
    )


def summed(z, x, batch):
    mask = batch.get("mask", jnp.ones(B))
    return jnp.sum(x * errors(z, batch) * mask), jnp.sum(mask)


ROWS, ALL = outer.sigmoid(N), outer.softmax(N)
NETWORK = outer.meta_weight_net(hidden=4)
DOMAINS = outer.domain_weights(3)
FINE = outer.network_weights(lambda batch: batch["a"], 3, 3, hidden=4)
PENALISED = bf.Problem(lambda z, x, batch: mean(z, x, batch) + x * jnp.sum(z**2), mean)
LINEAR = bf.linear_problem(
    logits=lambda z, batch: batch["a"] @ z,
    inner_losses=lambda logits, x, batch: jax.nn.sigmoid(x) * (logits - batch["y"]) ** 2,
    outer_losses=lambda logits, x, batch: (logits - batch["y"]) ** 2,
    per_sample=True,
)
SGD = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1)}
CASES = {
    "rows": (bf.Problem(by(ROWS), mean, per_sample=True), ROWS.init()),
    "softmax": (bf.Problem(by(ALL), mean), ALL.init()),
    "meta weight net": (bf.Problem(by(NETWORK), mean), NETWORK.init()),
    "domains": (bf.Problem(by_mixture(DOMAINS), mean), DOMAINS.init()),
    "network": (bf.Problem(by_mixture(FINE), mean), FINE.init()),
    "linear": (LINEAR, ROWS.init()),
    "sums in parts": (
        oracles.microbatched(oracles.weighted_sums(bf.Problem(summed, summed)), 2),
        1.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_padding_alone_moves_nothing_by_the_data_and_is_finite(name):
    """And so does a padded example whatever it holds: ids that there are not, NaN."""
    problem, x = CASES[name]
    odd = {
        "a": DATA["a"].at[2].set(jnp.nan),
        "y": DATA["y"],
        "index": DATA["index"].at[2].set(-7),
        "domain": DATA["domain"].at[2].set(99),
    }
    solver = bf.soba(problem, **SGD)
    state = solver.init(Z, jax.tree.map(jnp.asarray, x))
    state = state.replace(adjoint=jnp.array([0.1, 0.2, -0.1]))
    update = jax.jit(solver.update)
    batch = lambda mask: odd | {"mask": jnp.asarray(mask, jnp.float32)}
    new, info = update(state, bf.Batch(batch([0, 0, 0, 0]), batch([0, 0, 0, 0])))
    assert info.ok
    assert all(float(norm) == 0 for norm in info.norms)
    jax.tree.map(np.testing.assert_array_equal, new.variables, state.variables)
    _, info = update(state, bf.Batch(batch([1, 1, 0, 1]), batch([0, 0, 0, 0])))
    assert info.ok
    assert float(info.norms.inner) > 0
    assert float(info.outer_loss) == 0


EMPTY = jax.tree.map(lambda leaf: leaf[:0], DATA)
NESTED = {"inner_steps": 1, "adjoint_steps": 1}


@pytest.mark.parametrize("side", ["inner", "outer"])
@pytest.mark.parametrize("name", ["soba", "implicit"])
def test_a_minibatch_of_no_examples_is_refused(name, side):
    solver = (
        bf.soba(PENALISED, **SGD) if name == "soba" else bf.implicit(PENALISED, **SGD, **NESTED)
    )
    batch = bf.Batch(DATA, DATA)._replace(**{side: EMPTY})
    if solver.batches != (1, 1):
        repeat = lambda tree, count: jax.tree.map(lambda a: jnp.stack([a] * count), tree)
        batch = bf.Batch(*map(repeat, batch[:2], solver.batches))
    state = solver.init(Z, jnp.array(0.5))
    with pytest.raises(
        ValueError, match=rf"batch.{side}\['a'\] has shape \(0, 3\): a minibatch without"
    ):
        jax.eval_shape(solver.update, state, batch)
