"""Grain data sets and anything else with a length and items become arrays."""

import grain
import numpy as np
import pytest

from bilevel_flax import data


def items(n=6):
    return [
        {"x": np.full((2, 3), i, np.float32), "y": np.int32(i % 2), "name": "a"} for i in range(n)
    ]


def test_a_grain_pipeline_becomes_a_finite_sum():
    source = grain.MapDataset.source(items()).map(lambda item: {**item, "x": 2 * item["x"]})
    arrays = data.from_grain(source, keys=["x", "y"])
    assert set(arrays) == {"x", "y"}
    assert arrays["x"].dtype == np.float32 and arrays["y"].dtype == np.int32
    np.testing.assert_array_equal(arrays["x"], 2 * np.arange(6)[:, None, None] * np.ones((2, 3)))
    assert data.partition(arrays, 4).num_batches == 2


def test_without_keys_all_entries_are_read():
    assert set(data.from_grain([{"a": 1, "b": 2.0}])) == {"a", "b"}


@pytest.mark.parametrize(
    ("source", "keys", "error", "words"),
    [
        (iter([1]), None, TypeError, "must have __len__ and __getitem__"),
        ([], None, ValueError, "no items"),
        (grain.MapDataset.range(3).repeat(), None, ValueError, "leave .repeat"),
        ([1, 2], None, TypeError, r"source\[0\] must be a dict, got int"),
        ([{"x": 1}, {"y": 1}], None, ValueError, r'source\[1\] has no key "x", only \[\'y\'\]'),
        ([{"x": [1]}, {"x": [1, 2]}], None, ValueError, r"shape \[2\], earlier items \[1\]"),
        ([{"x": 1}, {"x": 1.5}], None, ValueError, "is float64, the first item int64"),
        (items(), None, ValueError, r'source\[0\]\["name"\] is no number'),
        (items(), ["z"], ValueError, 'no key "z"'),
    ],
)
def test_bad_sources(source, keys, error, words):
    with pytest.raises(error, match=words):
        data.from_grain(source, keys)
