"""Losses that are (sum, weight): exact however the minibatch is cut, whatever masks are called."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax.oracles.importance import importance_weighted
from bilevel_flax.oracles.microbatches import in_parts
from bilevel_flax.per_sample import densify

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(0)
VISIBLE = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])  # of a name that nobody knows
BATCH = {
    "tokens": RNG.normal(size=(4, 3)),
    "visible": VISIBLE,
    "domain": np.array([[0, 1, 1], [1, 0, 0], [2, 2, 2], [2, 0, 1]]),
    "index": np.array([3, 0, 5, 1], np.int32),
}
X = {"rows": jnp.asarray(RNG.normal(size=(6, 3))), "mixture": jnp.array([0.3, -0.2, 0.5])}
MIXTURE = bf.outer.domain_weights(3)
KEY = jax.random.PRNGKey(0)
PER_SAMPLE = {"rows": True, "mixture": False}


def inner_pair(z, x, batch):
    """Per-token weights twice: a row of x for each sequence, and the token's own domain."""
    weights = jax.nn.sigmoid(x["rows"]) * MIXTURE.weights(x["mixture"], batch)
    losses = jnp.exp(z["w"] * batch["tokens"]) * weights * batch["visible"]
    return jnp.sum(losses), jnp.sum(batch["visible"])


def outer_pair(z, x, batch):
    losses = (z["w"] - batch["tokens"]) ** 2 * batch["visible"]
    return jnp.sum(losses) + 0.0 * jnp.sum(x["mixture"]), jnp.sum(batch["visible"])


def mean_of(pair):
    def loss(*args):
        total, weight = pair(*args)
        return total / weight

    return loss


def with_state(loss):
    def stateful(z, x, batch, model_state, rng):
        return loss(z, x, batch), bf.Aux(model_state, {"one": jnp.float64(1.0)})

    return stateful


def problem_of(make, stateful=False):
    pairs = (make(inner_pair), make(outer_pair))
    pairs = tuple(map(with_state, pairs)) if stateful else pairs
    return bf.Problem(*pairs, per_sample=PER_SAMPLE, stateful=stateful)


def sums(stateful=False):
    return oracles.weighted_sums(problem_of(lambda pair: pair, stateful))


def point():
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), X)
    return bf.Variables({"w": jnp.float64(0.3)}, {"w": jnp.float64(0.7)}, x)


def evaluated(problem, evaluate=oracles.evaluate_all, **options):
    side = jax.tree.map(jnp.asarray, BATCH)
    evaluation = quick(
        lambda point: evaluate(problem, point, bf.Batch(side, side), {}, (KEY, KEY), **options)
    )(point())
    quantities, *losses = evaluation[:3]
    return quantities._replace(cross_jvp=densify(quantities.cross_jvp, point().outer)), losses


def close(found, expected, rtol=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), found, expected
    )


@pytest.mark.parametrize("stateful", [False, True], ids=["plain", "stateful"])
def test_parts_count_by_their_weight(x64, stateful: bool):
    expected = evaluated(problem_of(mean_of))
    problem = sums(stateful)
    close(evaluated(problem), expected)
    # One of the four parts is padding alone.
    close(evaluated(oracles.microbatched(problem, 4)), expected)
    # Any order of the wrappers; importance factors scale the sum, not the weight.
    mixed = oracles.mixed_precision(problem_of(lambda pair: pair, stateful), "float64")
    problem = oracles.weighted_sums(oracles.microbatched(oracles.remat(mixed), 2))
    twice = importance_weighted(
        importance_weighted(problem, jnp.float64(2.0), "inner_loss"), jnp.float64(2.0), "outer_loss"
    )
    close(evaluated(twice), jax.tree.map(lambda leaf: 2 * leaf, expected))


def test_a_subsample_is_unbiased(x64):
    (found, _), (other, _) = (
        evaluated(sums(), oracles.evaluate_subsample, block=jnp.int32(i), parts=2) for i in (0, 1)
    )
    expected, _ = evaluated(problem_of(mean_of))
    close(jax.tree.map(lambda a, b: (a + b) / 2, found, other), expected)


def test_one_reduction_over_devices_is_exact(x64):
    expected = evaluated(problem_of(mean_of))
    mesh = bf.sharding.make_mesh("data=4", jax.devices()[:4])
    for problem in (sums(), oracles.microbatched(sums(), 1)):
        side = jax.tree.map(jnp.asarray, BATCH)
        assert not bf.sharding.decomposition(problem, mesh, *point()[::2], bf.Batch(side, side))
        shared = bf.sharding.data_parallel(problem, mesh)
        state = bf.directions(shared).init(*point()[::2])
        oracle = oracles.bind(shared, state, bf.Batch(side, side))
        evaluation = quick(lambda at: oracle.at(at))(point())  # noqa: B023
        quantities = evaluation.oracles
        dense = densify(quantities.cross_jvp, point().outer)
        close((quantities._replace(cross_jvp=dense), list(evaluation[1:3])), expected, 1e-6)


def test_microbatches_live_inside_the_devices_shares():
    problem = oracles.microbatched(sums(), 2)
    mesh = bf.sharding.make_mesh("data=2", jax.devices()[:2])
    for wrapped in (bf.sharding.data_parallel(problem, mesh), bf.sharding.whole(problem)):
        assert in_parts(wrapped.inner_loss)
        assert in_parts(wrapped.outer_loss)


def test_what_is_counted_is_not_rounded():
    ones = {"a": jnp.ones(1001), "mine": jnp.ones(1001)}
    loss = lambda z, x, batch: (z * jnp.sum(batch["a"]), jnp.sum(batch["mine"]))
    problem = oracles.mixed_precision(oracles.weighted_sums(bf.Problem(loss, loss)), "bfloat16")
    # 1001 is 1000 in bfloat16, as the sum of losses is here, and the number of examples must not.
    assert float(problem.inner_loss(1.0, 0.0, ones)) == pytest.approx(1000 / 1001, rel=1e-6)


def test_a_sum_that_is_handed_in_as_a_mean_is_told():
    side = {key: jnp.asarray(leaf) for key, leaf in BATCH.items()}
    batch, at = bf.Batch(side, side), point()
    check = bf.diagnostics.check_means
    total = lambda pair: lambda *args: pair(*args)[0]
    mean = mean_of(outer_pair)
    problem = bf.Problem(mean_of(inner_pair), mean, per_sample=PER_SAMPLE)
    assert not check(problem, at, batch)
    assert not check(sums(stateful=True), at, batch, model_state={})
    for inner, outer, name in (
        (total(inner_pair), mean, "inner_loss"),
        (mean_of(inner_pair), total(outer_pair), "outer_loss"),
    ):
        problem = bf.Problem(inner, outer, per_sample=PER_SAMPLE)
        with pytest.warns(UserWarning, match=f"{name} of a minibatch is .*return the mean"):
            assert name in check(problem, at, batch)
    with_penalty = lambda z, x, batch: outer_pair(z, x, batch)[0] + jnp.sum(z["w"] ** 2)
    problem = bf.Problem(mean_of(inner_pair), with_penalty, per_sample=PER_SAMPLE)
    with pytest.warns(UserWarning, match="a term of outer_loss is a sum over"):
        assert check(problem, at, batch)


def test_mistakes_are_told_in_one_line():
    side = jax.tree.map(jnp.asarray, BATCH)
    batch, at = bf.Batch(side, side), (jnp.float32(1.0), jnp.float32(2.0))
    at = bf.Variables(at[0], at[0], at[1])
    count = lambda z, x, batch: (z * jnp.sum(batch["tokens"]) * x, x * jnp.sum(batch["visible"]))
    problem = oracles.weighted_sums(bf.Problem(count, count))
    oracles.evaluate_all(problem, at, batch)  # as a whole it is a quotient like any other
    with pytest.raises(ValueError, match="weight of inner_loss depends on more than the minibatch"):
        oracles.evaluate_all(oracles.microbatched(problem, 2), at, batch)
    with pytest.raises(TypeError, match=r"\(sum, weight\) under bf.oracles.weighted_sums"):
        oracles.evaluate_all(bf.Problem(count, count), at, batch)
    alone = oracles.weighted_sums(bf.Problem(lambda z, x, b: z * x, count))
    with pytest.raises(TypeError, match="must return a pair of scalars"):
        oracles.evaluate_all(alone, at, batch)
    wide = oracles.weighted_sums(bf.Problem(lambda z, x, b: (z * x, b["visible"]), count))
    with pytest.raises(TypeError, match=r"got \(shape \(\), shape \(4, 3\)\)"):
        oracles.evaluate_all(wide, at, batch)


TOKEN_LOSSES = {  # of losses [batch, tokens] and a mask of them
    "a quotient": lambda e, m: jnp.sum(e * m) / jnp.sum(m),
    "a quotient before the sum": lambda e, m: jnp.sum(e * m / jnp.maximum(jnp.sum(m), 1)),
    "a reciprocal": lambda e, m: jnp.sum(e * m) * jnp.sum(m) ** -1.0,
    "mean(where)": lambda e, m: jnp.mean(e, where=m > 0),
    "average": lambda e, m: jnp.average(e, weights=m),
    "weights of classes": lambda e, m: jnp.sum(e[:, 0] * W[m[:, 0]]) / jnp.sum(W[m[:, 0]]),
}
W = jnp.array([1.0, 3.0])


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_mean_over_something_else_than_examples_is_not_cut(name):
    """The mean of the parts' means was taken, off by a third."""
    mean = lambda z, x, b: TOKEN_LOSSES[name]((z - b["tokens"]) ** 2, b["visible"]) * x
    plain = lambda z, x, b: jnp.mean((z - b["tokens"]) ** 2)
    side, at = jax.tree.map(jnp.asarray, BATCH), bf.Variables(*map(jnp.float32, (1.0, 1.0, 2.0)))

    def evaluate(problem, **more):
        cut = oracles.microbatched(problem, 2)
        jax.eval_shape(lambda: oracles.evaluate_all(cut, at, bf.Batch(side | more, side)).oracles)

    with pytest.raises(ValueError, match="inner_loss divides by what it counts.*microbatches=2"):
        evaluate(bf.Problem(mean, plain))
    evaluate(bf.Problem(mean, plain), example_mask=jnp.sum(side["visible"], axis=1))


def test_a_mean_over_examples_may_divide_within_each():
    each = lambda b: jnp.sum(b["tokens"] ** 2 * b["visible"], 1) / (1 + jnp.sum(b["visible"], 1))
    scale = lambda z, b: jnp.tanh(z * b["tokens"]) / jnp.mean((z * b["tokens"]) ** 2)
    loss = lambda z, x, b: jnp.mean(z * each(b) / b["unit"]) * x + jnp.mean(scale(z, b)) / len(W)
    side, at = jax.tree.map(jnp.asarray, BATCH), bf.Variables(*map(jnp.float32, (1.0, 1.0, 2.0)))
    side = side | {"unit": jnp.float32(2.0)}
    cut = oracles.microbatched(bf.Problem(loss, loss), 2)
    jax.eval_shape(lambda: oracles.evaluate_all(cut, at, bf.Batch(side, side)).oracles)


def test_domains_of_tokens():
    batch = jax.tree.map(jnp.asarray, BATCH)
    x = jnp.log(jnp.array([1.0, 2.0, 5.0]))
    weights = MIXTURE.weights(x, batch)
    expected = 3 * np.array([1, 2, 5])[BATCH["domain"]] / 8
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    padded = {
        **batch,
        "example_mask": jnp.array([1, 1, 0, 1]),
        "domain": batch["domain"].at[2].set(99),
    }
    np.testing.assert_allclose(
        MIXTURE.weights(x, padded), expected * np.array([1, 1, 0, 1])[:, None], rtol=1e-6
    )
