"""The partition into minibatches: nothing lost, nothing counted twice, truly weighted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_flax import data


@st.composite
def sizes(draw):
    n = draw(st.integers(1, 60))
    return n, draw(st.integers(1, n)), draw(st.integers(0, 5)), draw(st.booleans())


def make(n, batch_size, seed, shuffle):
    x = np.random.default_rng(n).normal(size=(n, 3))
    arrays = {"x": x, "nested": {"y": np.arange(n)}}
    return arrays, data.partition(arrays, batch_size, seed=seed, shuffle=shuffle)


@settings(max_examples=60, deadline=None)
@given(sizes())
def test_every_example_comes_exactly_once_and_padding_repeats_its_own_minibatch(case):
    arrays, parts = make(*case)
    n, batch_size, _, shuffle = case
    index = parts.batches["index"]
    mask = parts.batches.get("mask", np.ones(index.shape, np.float32))

    assert index.shape == (parts.num_batches, batch_size) and index.dtype == np.int32
    assert parts.num_batches == -(-n // batch_size) and parts.num_samples == n
    assert ("mask" in parts.batches) == (n % batch_size != 0) == parts.ragged
    assert mask.dtype == np.float32 and mask[:-1].all()
    assert sorted(index[mask == 1]) == list(range(n))
    assert set(index[-1][mask[-1] == 0]) <= set(index[-1][mask[-1] == 1])
    np.testing.assert_array_equal(parts.batches["x"], arrays["x"][index])
    np.testing.assert_array_equal(parts.batches["nested"]["y"], index)
    if not shuffle:
        np.testing.assert_array_equal(index[mask == 1], np.arange(n))


@settings(max_examples=60, deadline=None)
@given(sizes())
def test_weighted_masked_means_are_the_mean_over_all_samples(case):
    arrays, parts = make(*case)
    mask = parts.batches.get("mask", np.ones(parts.batches["index"].shape))[..., None]
    means = (parts.batches["x"] * mask).sum(1) / mask.sum(1)

    assert parts.weights.dtype == np.float32
    np.testing.assert_allclose(parts.weights.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(parts.weights, mask[..., 0].sum(1) / case[0], rtol=1e-6)
    np.testing.assert_allclose(
        parts.weights.astype(np.float64) @ means, arrays["x"].mean(0), rtol=1e-6, atol=1e-7
    )


def test_a_minibatch_is_one_contiguous_slice():
    parts = data.partition({"x": np.ones((10, 4), np.float32)[:, ::2]}, 4)
    assert all(leaf.flags.c_contiguous for leaf in parts.batches.values())
    assert parts.nbytes == 3 * 4 * (2 * 4 + 4 + 4)


def test_the_permutation_belongs_to_the_seed():
    def order(seed):
        return data.partition({"x": np.arange(100)}, 10, seed=seed).batches["index"].ravel()

    np.testing.assert_array_equal(order(3), order(3))
    assert (order(3) != order(4)).any() and (order(3) != np.arange(100)).any()


def test_the_permutation_is_the_one_it_always_was():
    # A changed stream would silently break the resumption of every existing run.
    parts = data.partition({"x": np.arange(8)}, 8, seed=0)
    np.testing.assert_array_equal(parts.batches["index"][0], [7, 4, 5, 1, 6, 2, 0, 3])


@pytest.mark.parametrize(
    ("arrays", "batch_size", "error", "words"),
    [
        ({"x": np.ones(5), "y": np.ones(4)}, 2, ValueError, '"x" has 5, "y" has 4'),
        ({"x": np.ones((0, 3))}, 1, ValueError, "no examples"),
        ({}, 1, ValueError, "holds no array"),
        ({"x": np.ones(5)}, 0, ValueError, "n = 5, got 0: use 1 or more"),
        ({"x": np.ones(5)}, 6, ValueError, "n = 5, got 6: use 5 or fewer"),
        ({"x": np.ones(5)}, 2.0, TypeError, "batch_size must be an integer, got 2.0"),
        ({"x": np.ones(5), "index": np.arange(5)}, 2, ValueError, 'key "index"'),
        ({"mask": np.ones(5)}, 2, ValueError, 'key "mask"'),
        (np.ones(5), 2, TypeError, "must be a dict of arrays, got ndarray"),
        ({"x": {"y": 3.0}}, 1, TypeError, 'arrays\\["x/y"\\] is a scalar'),
        ({"x": np.array(["a", None])}, 1, TypeError, "no array of numbers"),
        ({"x": np.array(["a", "b"])}, 1, TypeError, "no array of numbers"),
    ],
)
def test_bad_input(arrays, batch_size, error, words):
    with pytest.raises(error, match=words) as caught:
        data.partition(arrays, batch_size)
    assert "\n" not in str(caught.value)


def test_bad_seed():
    with pytest.raises(ValueError, match="non-negative integer, got -1"):
        data.partition({"x": np.ones(3)}, 1, seed=-1)
    with pytest.raises(TypeError, match="non-negative integer, got 0.5"):
        data.partition({"x": np.ones(3)}, 1, seed=0.5)


def test_gather_takes_minibatches_in_any_arrangement():
    parts = data.partition({"x": np.arange(12.0)}, 3)
    taken = data.gather(parts, np.array([[2, 0], [1, 1]]))
    assert taken["x"].shape == (2, 2, 3)
    np.testing.assert_array_equal(taken["x"][0, 1], parts.batches["x"][0])
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"\[0, 4\) for 4 minibatches, got {wrong}"):
            data.gather(parts, np.array([0, wrong]))
