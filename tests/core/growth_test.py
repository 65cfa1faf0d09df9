"""A sum that passes for a mean is found in the program, and refused where a minibatch is cut."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.oracles.growth import growth


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        return h + nn.Dense(4)(nn.gelu(h)), None


class Transformer(nn.Module):
    """With its layers in a scan, rematerialised."""

    @nn.compact
    def __call__(self, tokens):
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        h, _ = nn.scan(nn.remat(Block), **layers)()(nn.Embed(5, 4)(tokens), None)
        return nn.Dense(5)(h)


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, images):
        h = nn.BatchNorm(use_running_average=False)(nn.Conv(2, (3, 3))(images))
        h = nn.avg_pool(nn.relu(h), (2, 2)).reshape(len(h), -1)
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=False)(h))


cross_entropy = optax.softmax_cross_entropy_with_integer_labels
TOKENS = jnp.arange(20).reshape(4, 5) % 5
IMAGES = jnp.ones((4, 4, 4, 1))
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
TRANSFORMER = Transformer().init(KEYS, TOKENS)
CONVOLUTIONS = Convolutions().init(KEYS, IMAGES)
ROWS, TARGETS, GROUPS = jnp.arange(12.0).reshape(4, 3), jnp.arange(4.0), jnp.arange(4) % 3


def lm(z, tokens):
    return cross_entropy(Transformer().apply(z, tokens), tokens)


def cnn(z, images):
    logits, _ = Convolutions().apply(
        z, images, mutable=["batch_stats"], rngs={"dropout": KEYS["dropout"]}
    )
    return cross_entropy(logits, jnp.zeros(len(images), jnp.int32))


def by_group(values, groups):
    return jax.ops.segment_sum(values, groups, 3)


error = lambda d, z: (d[0] @ z - d[1]) ** 2
recurrent = lambda d, z: jax.lax.scan(lambda c, a: (jnp.tanh(c * z[0] + a), c), d[1], d[0].T)
over_examples = lambda d, z: jax.lax.scan(lambda c, e: (c + e, None), 0.0, error(d, z))[0]
LINEAR = ([ROWS, TARGETS, GROUPS], jnp.ones(3))
MEANS = {
    "of a transformer": (lambda d, z: lm(z, d[0]).mean(), [TOKENS], TRANSFORMER),
    "of a CNN": (lambda d, z: cnn(z, d[0]).mean(), [IMAGES], CONVOLUTIONS),
    "with a penalty": (lambda d, z: error(d, z).mean() + jnp.sum(z**2), *LINEAR),
    "by its length": (lambda d, z: error(d, z).sum() * (1000 / len(d[1])), *LINEAR),
    "of a norm": (lambda d, z: jnp.sum(jnp.linalg.norm(d[0] @ z)) ** 2 / d[0].size, *LINEAR),
    "of groups": (
        lambda d, z: jnp.max(
            by_group(error(d, z), d[2]) / jnp.maximum(by_group(jnp.ones(len(d[2])), d[2]), 1)
        ),
        *LINEAR,
    ),
    "where": (lambda d, z: jnp.mean(error(d, z), where=d[1] > 1), *LINEAR),
    "of a recurrent network": (lambda d, z: recurrent(d, z)[0].mean(), *LINEAR),
    "of weights that sum to 1": (lambda d, z: jnp.sum(jax.nn.softmax(d[1]) * d[1]), *LINEAR),
    "of parts": (lambda d, z: jax.lax.map(jnp.mean, error(d, z).reshape(2, -1)).mean(), *LINEAR),
    "that is none, of the largest": (lambda d, z: error(d, z).max(), *LINEAR),
    # Here nothing is claimed, whatever they are.
    "in a loop over examples": (lambda d, z: over_examples(d, z) / len(d[1]), *LINEAR),
    "in Python": (lambda d, z: sum(d[1][i] * z[0] for i in range(len(d[1]))), *LINEAR),
    "of one size": (lambda d, z: error(d, z).reshape(4).sum(), *LINEAR),
    "running": (lambda d, z: jnp.cumsum(error(d, z))[-1] / len(d[1]), *LINEAR),
}
SUMS = {
    "of a transformer": (lambda d, z: lm(z, d[0]).sum(), [TOKENS], TRANSFORMER, 1),
    "of means over tokens": (lambda d, z: lm(z, d[0]).mean(1).sum(), [TOKENS], TRANSFORMER, 1),
    "of a CNN": (lambda d, z: cnn(z, d[0]).sum(), [IMAGES], CONVOLUTIONS, 1),
    "with a penalty": (lambda d, z: error(d, z).sum() + jnp.sum(z**2), *LINEAR, 1),
    "over a number": (lambda d, z: error(d, z).sum() / 64, *LINEAR, 1),
    "of a norm": (lambda d, z: jnp.linalg.norm(d[0] @ z - d[1]), *LINEAR, 0.5),
    "of groups": (lambda d, z: by_group(error(d, z), d[2]).mean(), *LINEAR, 1),
    "of pairs": (lambda d, z: jnp.sum(d[0] @ jnp.diag(z) @ d[0].T), *LINEAR, 2),
    "in a product": (lambda d, z: jnp.dot(d[0] @ z, d[1]), *LINEAR, 1),
    "in a branch": (
        lambda d, z: jax.lax.cond(z[0] > 0, jnp.sum, lambda e: 2 * jnp.sum(e), error(d, z)),
        *LINEAR,
        1,
    ),
    "of parts": (lambda d, z: jax.lax.map(jnp.sum, error(d, z).reshape(2, -1)).sum(), *LINEAR, 1),
    "of a recurrent network": (lambda d, z: recurrent(d, z)[1].sum(), *LINEAR, 1),
    "of a mean over a length": (lambda d, z: error(d, z).mean() / len(d[1]), *LINEAR, -1),
}


def power(loss, arrays, params):
    return growth(loss, arrays, [jnp.concatenate([a, a]) for a in arrays], params).power


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_does_not_grow(name):
    assert power(*MEANS[name]) == 0


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_grows(name):
    *given, expected = SUMS[name]
    assert power(*given) == expected


SPLITS = {
    "microbatches=2": lambda problem: bf.directions(bf.oracles.microbatched(problem, 2)),
    "data_parallel": lambda problem: bf.directions(
        bf.sharding.data_parallel(problem, bf.sharding.make_mesh("data=2", jax.devices()[:2]))
    ),
    "a subsample of 1/2": lambda problem: bf.auto(
        problem, inner=optax.sgd(0.1), steps=9, subsample=0.5
    ),
}


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("side", ["inner_loss", "outer_loss"])
def test_a_sum_is_not_cut(splits: str, side: str):
    mean = lambda z, x, batch: jnp.mean((batch @ z) ** 2) * jnp.exp(x)
    total = lambda z, x, batch: jnp.sum((batch @ z) ** 2) * jnp.exp(x)
    losses = {"inner_loss": mean, "outer_loss": mean, side: total}
    solver = SPLITS[splits](bf.Problem(**losses))
    state, batch = solver.init(jnp.zeros(3), jnp.zeros(())), bf.Batch(*[jnp.ones((4, 3))] * 2)
    text = f"{side} is no mean over the minibatch's examples: .* 2 times as large, so {splits}"
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(solver.update, state, batch)
    solver = SPLITS[splits](bf.Problem(mean, mean))
    jax.eval_shape(solver.update, solver.init(jnp.zeros(3), jnp.zeros(())), batch)


def test_a_mean_in_the_place_of_a_sum_is_not_cut():
    pair = lambda z, x, batch: (jnp.mean((batch @ z) ** 2) * x, jnp.float32(len(batch)))
    problem = bf.oracles.microbatched(bf.oracles.weighted_sums(bf.Problem(pair, pair)), 2)
    at = bf.Variables(jnp.zeros(3), jnp.zeros(3), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"0.5 times as large, .* or \(sum, weight\)"):
        bf.oracles.evaluate(problem, at, bf.Batch(jnp.ones((4, 3)), jnp.ones((4, 3))))
