"""Which examples of a minibatch are real, and that nothing else is taken for it."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax.minibatches import example_mask, repeat_real

ROWS = jnp.arange(4)
TOKENS = jnp.array([[1.0, 2.0, 0.5], [3.0, 1.0, 0.0], [0.2, 0.0, 0.0], [2.0, 1.5, 0.0]])
POINT = bf.Variables(jnp.array(0.3), jnp.array(1.0), jnp.array([2.0, -2.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (TOKENS, None),
        ({"x": TOKENS}, None),
        ({"x": TOKENS, "mask": None}, None),
        ({"x": TOKENS, "mask": jnp.ones(4)}, 4),
        ({"x": TOKENS, "mask": np.ones(4, bool)}, 4),
        (FrozenDict({"x": TOKENS, "mask": jnp.ones(4, int)}), 4),
        ({"mask": jnp.ones(4)}, 4),
        ({"x": (TOKENS, TOKENS), "mask": TOKENS}, None),
        ({"x": TOKENS, "mask": jnp.ones((4, 1))}, None),
        ({"x": TOKENS, "mask": jnp.ones(3)}, None),  # of features
        ({"x": TOKENS, "scale": jnp.ones(3), "index": ROWS, "mask": jnp.ones(3)}, None),
        ({"x": TOKENS, "mask": jnp.ones(()), "index": ROWS}, None),
        ({"x": TOKENS, "mask": TOKENS, "example_mask": jnp.ones(4)}, 4),
        ({"x": TOKENS, "mask": jnp.ones(4), "example_mask": None}, None),
    ],
)
def test_the_mask_of_the_examples(batch, expected):
    mask = example_mask(batch)
    assert (None if mask is None else len(mask)) == expected


def test_a_chosen_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r'"example_mask"\] has shape \(3,\).*must be \[4\]'):
        example_mask({"x": TOKENS, "example_mask": jnp.ones(3)})


def evaluate(problem, *inputs):
    return jax.jit(lambda: oracles.evaluate(problem, *inputs))()


def by_sequence(z, batch, name):
    mask = batch[name]
    return (((z * batch["x"] - 1) ** 2) * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("name", ["mask", "visible"])
def test_a_mask_of_tokens_is_data(name):
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(jax.nn.sigmoid(x) * by_sequence(z, batch, name)),
        lambda z, x, batch: jnp.mean(by_sequence(z, batch, name)),
        per_sample=True,
    )
    data = {"x": TOKENS, name: (TOKENS > 0).astype(jnp.float32), "index": ROWS}
    found = evaluate(problem, POINT, bf.Batch(data, data))
    z, v, x = (np.asarray(leaf, np.float64) for leaf in POINT)
    mask, tokens, weight = (
        np.asarray(data[name]),
        np.asarray(TOKENS, np.float64),
        1 / (1 + np.exp(-x)),
    )
    slope = (2 * tokens * (z * tokens - 1) * mask).sum(1) / mask.sum(1)
    curvature = (2 * tokens**2 * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(found.inner_grad, (weight * slope).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.hvp, (weight * curvature).mean() * v, rtol=1e-5)
    assert found.cross_jvp.index.tolist() == [0, 1, 2, 3]
    cross = weight * (1 - weight) * slope * v / 4
    np.testing.assert_allclose(found.cross_jvp.values, cross, rtol=1e-5)


# Finite at real examples, without a finite derivative at padding of zeros; each on a z and an x of
# its own.
LOSSES = {
    "log": lambda z, x, row: jnp.log(x * z * row[0]) ** 2,
    "norm": lambda z, x, row: jnp.linalg.norm(x * row) * z**2,
    "division": lambda z, x, row: (z * x / row[0]) ** 2,
}


def of_real_rows(z, x, batch):
    """The sum of all `LOSSES`, its mean over the real examples."""
    rows = jax.vmap(lambda row: sum(loss(z[k], x[k], row) for k, loss in LOSSES.items()))
    return bf.masked_mean(rows(batch["x"]), example_mask(batch))


@pytest.mark.parametrize("mask", [[1.0, 1, 1, 0], [0.0, 1, 1, 0], [True, False, False, False]])
def test_padding_without_a_derivative_leaves_no_trace(mask):
    mask = np.array(mask)
    x = np.where(mask[:, None] > 0, np.asarray(TOKENS) + 0.1, 0).astype(np.float32)
    at = bf.Variables(*(dict.fromkeys(LOSSES, jnp.float32(value)) for value in (0.3, 1.0, 1.5)))
    problem = bf.Problem(of_real_rows, of_real_rows)
    real, padded = (bf.Batch(data, data) for data in ({"x": x[mask > 0]}, {"x": x, "mask": mask}))

    @jax.jit
    def run():
        found = [
            oracles.evaluate(oracles.microbatched(problem, parts), at, padded) for parts in (1, 2)
        ]
        blocks = [
            oracles.evaluate_subsample(problem, at, padded, block=i, parts=2).oracles.hvp
            for i in range(2)
        ]
        return found, blocks, oracles.evaluate(problem, at, real)

    all_found, blocks, expected = run()
    for found in all_found:
        for (path, a), b in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
    for name in LOSSES:
        mean = (blocks[0][name] + blocks[1][name]) / 2
        np.testing.assert_allclose(mean, expected.hvp[name], rtol=1e-5, err_msg=name)


def test_padding_made_by_partition_stays_as_it_is():
    side = bf.data.partition({"x": np.arange(10.0), "key": np.arange(10)}, 4, seed=3)
    for i in range(side.num_batches):
        minibatch = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), side.batches)
        jax.tree.map(np.testing.assert_array_equal, repeat_real(minibatch), minibatch)


def test_masked_mean_weighs():
    values, mask = jnp.array([1.0, 5.0, jnp.nan]), jnp.array([0.25, 0.5, 0.0])
    assert float(bf.masked_mean(values, mask)) == pytest.approx(2.75 / 0.75)
    assert float(bf.masked_mean(values, jnp.zeros(3))) == 0


def over_tokens(z, x, batch):
    mask = batch["mask"]
    return jnp.sum(x * (z * batch["x"] - 1) ** 2 * mask) / jnp.sum(mask)


def over_sequences(z, x, batch):
    return jnp.mean(x * by_sequence(z, batch, "mask"))


@pytest.mark.parametrize("loss", [over_tokens, over_sequences])
def test_parts_of_a_mean_over_tokens_count_by_their_tokens(loss):
    whole = bf.Problem(loss, loss)
    split = oracles.microbatched(whole, 2)
    at = POINT._replace(outer=jnp.array(1.5))
    mask = (TOKENS > 0).astype(jnp.float32)
    data = {"x": TOKENS, "mask": mask}
    expected = evaluate(whole, at, bf.Batch(data, data))
    with pytest.raises(ValueError, match=r'microbatches=2 cannot tell.*batch\["example_mask"\]'):
        oracles.evaluate(split, at, bf.Batch(data, data))
    with pytest.raises(ValueError, match="subsample of 1/2 cannot tell"):
        oracles.evaluate_subsample(whole, at, bf.Batch(data, data), block=0, parts=2)
    data["example_mask"] = mask.sum(1) if loss is over_tokens else jnp.ones(4)
    found = evaluate(split, at, bf.Batch(data, data))
    np.testing.assert_allclose(found.inner_grad, expected.inner_grad, rtol=1e-5)
    np.testing.assert_allclose(found.cross_jvp, expected.cross_jvp, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32", "int32"])
def test_an_index_of_any_integer_finds_its_row(dtype):
    count = 300
    rows = np.array([0, 44, 100, 127])
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(x * (z - 1) ** 2), lambda z, x, batch: z**2, per_sample=True
    )
    data = {"index": rows.astype(dtype), "mask": jnp.array([1, 1, 1, 0])}
    x = jnp.arange(count, dtype=jnp.float32)
    at = bf.Variables(jnp.array(0.5), jnp.array(1.0), x)
    cross, found = jax.jit(
        lambda: (
            oracles.evaluate(problem, at, bf.Batch(data, data)).cross_jvp,
            oracles.inner_grad(problem, *at[::2], data),
        )
    )()
    assert cross.index.tolist() == [0, 44, 100, count]  # padding moves no row
    assert cross.index.dtype == jnp.int32
    np.testing.assert_allclose(found, -(x[rows] * jnp.array([1, 1, 1, 0])).sum() / 4)


@pytest.mark.parametrize(
    "views",
    [(TOKENS, TOKENS), {"left": TOKENS, "right": TOKENS}, {0: TOKENS, 1: TOKENS}, [TOKENS, None]],
    ids=["tuple", "dict", "int keys", "None"],
)
@pytest.mark.parametrize("container", [dict, FrozenDict])
def test_minibatches_of_any_pytree(views, container):
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(x * z * jax.tree.leaves(batch["views"])[0][:, 0]),
        lambda z, x, batch: z**2,
        per_sample=True,
    )
    data = container({"views": views, "mask": None, "index": ROWS})
    grad = jax.jit(lambda data: oracles.inner_grad(problem, *POINT[::2], data))(data)
    np.testing.assert_allclose(grad, (POINT.outer * TOKENS[:, 0]).mean(), rtol=1e-6)


class Sequences(NamedTuple):
    """A minibatch that is no dict."""

    x: jax.Array
    index: jax.Array
    mask: jax.Array | None = None


@flax.struct.dataclass
class Examples:
    x: jax.Array
    index: jax.Array
    mask: jax.Array | None = None
    name: str = flax.struct.field(pytree_node=False, default="of a dataclass")


@pytest.mark.parametrize("kind", [Sequences, Examples])
def test_fields_are_what_a_dicts_entries_are(kind):
    """Their masks were overlooked: parts with less real examples counted as much as others."""

    def loss(z, x, batch):
        read = lambda name: batch[name] if isinstance(batch, dict) else getattr(batch, name)
        errors = jnp.log(x) * jnp.log(z * read("x")[:, 0]) ** 2
        return bf.masked_mean(errors, read("mask"))

    mask = jnp.array([1.0, 1.0, 0.0, 1.0])
    data = {"x": TOKENS.at[2].set(0.0), "index": ROWS, "mask": mask}
    problem = bf.Problem(loss, lambda z, x, batch: z**2, per_sample=True)
    at = POINT._replace(outer=jnp.array([2.0, 3.0, 0.5, 1.5]))
    evaluate = jax.jit(lambda b: oracles.evaluate(oracles.microbatched(problem, 2), at, b))
    found, expected = (evaluate(bf.Batch(side, side)) for side in (kind(**data), data))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(found.inner_grad)
    assert type(repeat_real(kind(**data))) is kind
    with pytest.raises(ValueError, match=r'need batch\["index"\].*the batch has'):
        oracles.inner_grad(problem, *at[::2], kind(TOKENS, None))
