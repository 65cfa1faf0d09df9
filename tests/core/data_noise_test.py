"""Label noise at its rate, standardisation, stratified splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_flax import data

LABELS = np.repeat(np.arange(10), 2000)


def deviation(p):
    """Bernstein's inequality with e^-12.5: at tiny rates one label is many standard deviations."""
    few = 12.5 / 3 / len(LABELS) if 0 < p < 1 else 1e-12
    return 5 * np.sqrt(p * (1 - p) / len(LABELS)) + few


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 10**6))
def test_symmetric_noise_makes_nine_tenths_of_p_wrong(p, seed):
    noisy, wrong = data.corrupt_labels(LABELS, p, 10, seed)
    np.testing.assert_array_equal(wrong, noisy != LABELS)
    assert noisy.dtype == np.int32 and noisy.min() >= 0 and noisy.max() <= 9
    assert abs(wrong.mean() - 0.9 * p) <= deviation(0.9 * p)


def test_symmetric_noise_is_uniform_over_the_classes():
    noisy, _ = data.corrupt_labels(LABELS, 1.0, 10, seed=1)
    table = np.zeros((10, 10))
    np.add.at(table, (LABELS, noisy), 1)
    assert abs(table - 200).max() < 6 * np.sqrt(200)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 10**6))
def test_class_noise_moves_to_the_next_class(p, seed):
    noisy, wrong = data.corrupt_labels(LABELS, p, 10, seed, kind="class")
    np.testing.assert_array_equal(noisy[wrong], (LABELS[wrong] + 1) % 10)
    np.testing.assert_array_equal(noisy[~wrong], LABELS[~wrong])
    assert abs(wrong.mean() - p) <= deviation(p)


def test_noise_belongs_to_the_seed_and_leaves_its_argument_alone():
    before = LABELS.copy()
    first, second, other = (data.corrupt_labels(LABELS, 0.5, 10, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    np.testing.assert_array_equal(LABELS, before)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            ([0, 1, 10], 0.5, 10, 0),
            ValueError,
            r"labels\[2\] is 10, out of range for num_classes=10",
        ),
        (([0, -1], 0.5, 10, 0), ValueError, r"labels\[1\] is -1"),
        (([0.0, 1.0], 0.5, 10, 0), TypeError, "labels must be integers"),
        (([[0, 1]], 0.5, 10, 0), TypeError, "not one-hot"),
        (([0, 1], 1.2, 10, 0), ValueError, r"p must be a probability in \[0, 1\], got 1.2"),
        (([0, 1], float("nan"), 10, 0), ValueError, "got nan"),
        (([0, 1], -0.1, 10, 0), ValueError, "got -0.1"),
        (([0, 0], 0.5, 1, 0), ValueError, "num_classes must be at least 2, got 1"),
        (([0, 1], 0.5, 2, 0, "symetric"), ValueError, "got 'symetric': use \"symmetric\""),
        (([0, 1], 0.5, 2, 0, "clas"), ValueError, 'use "class"'),
    ],
)
def test_bad_labels(arguments, error, words):
    with pytest.raises(error, match=words):
        data.corrupt_labels(*arguments)


def test_standardize_uses_the_training_sets_statistics():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (500, 4, 3), dtype=np.uint8)
    train[:, 1, 1] = 7
    other = rng.integers(0, 256, (20, 4, 3), dtype=np.uint8)
    scaled, scaled_other = data.standardize(train, other)

    assert scaled.dtype == scaled_other.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
    varies = train.std(0) > 0
    np.testing.assert_allclose(scaled.std(0)[varies], 1, rtol=1e-5)
    assert not scaled[:, 1, 1].any()
    expected = (other - train.mean(0)) / np.where(varies, train.std(0), 1)
    np.testing.assert_allclose(scaled_other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e6 + 0.1, 0.0, 1e-300])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [3, 10_001])
def test_a_feature_that_does_not_vary_is_only_shifted(value, dtype, n):
    train = np.full((n, 2), value).astype(dtype)
    train[:, 1] = np.arange(n) % 3
    other = train[:2] + np.array([2, 0], dtype)
    scaled, scaled_other = data.standardize(train, other)
    assert not scaled[:, 0].any()
    np.testing.assert_allclose(scaled_other[:, 0], 2.0, rtol=np.finfo(dtype).eps * (1 + abs(value)))


def test_rounding_is_no_variation_and_a_large_mean_swallows_none():
    train = np.array([[0.1 + 0.2, 1.7e9], [0.3, 1.7e9 + 4]])
    scaled, other = data.standardize(train, np.array([[1.3, 1.7e9 + 6]]))
    np.testing.assert_allclose(scaled, [[0, -1], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(other, [[1, 2]], rtol=1e-6)


def test_standardize_errors():
    with pytest.raises(ValueError, match=r"train has \[3\] an example, another array \[4\]"):
        data.standardize(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="at least one example"):
        data.standardize(np.ones((0, 3)))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=5).filter(any),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.integers(0, 100),
)
def test_splits_are_disjoint_and_stratified(counts, shares, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    total = max(sum(shares), 1)
    sizes = {str(i): int(share / total * len(labels)) for i, share in enumerate(shares)}
    parts = data.stratified(labels, sizes, seed=seed)

    assert {name: len(part) for name, part in parts.items()} == sizes
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together)
    for part in parts.values():
        got = np.bincount(labels[part], minlength=len(counts))
        assert abs(got - len(part) * np.array(counts) / len(labels)).max() <= len(counts)


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        (
            {"train": 8, "test": 3},
            ValueError,
            "train 8 .* test 3 = 11 examples and the data has 10",
        ),
        ({"train": -1}, ValueError, "train split must be at least 0, got -1"),
        ({"train": 0.5}, TypeError, "train split must be an integer, got 0.5"),
    ],
)
def test_impossible_splits(sizes, error, words):
    with pytest.raises(error, match=words):
        data.stratified(np.zeros(10, int), sizes, seed=0)
