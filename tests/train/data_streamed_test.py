"""Streamed minibatches read as arrays do, and only what is asked for."""

from __future__ import annotations

import grain
import jax
import numpy as np
import pytest

from bilevel_flax import data
from bilevel_flax.data import subsample


class Counted:
    """A source that says what was read."""

    def __init__(self, n: int):
        self.n, self.read = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        self.read.append(i)
        return {"x": np.arange(3) + 10 * i, "y": np.float32(i)}


def side_of(source: Counted, batch: int = 2):
    return data.streamed(grain.MapDataset.source(source).batch(batch))


def test_it_reads_as_the_arrays_do():
    side = side_of(Counted(8))
    x = np.arange(3) + 10 * np.arange(8)[:, None]
    whole = x.reshape(4, 2, 3)
    leaf = side.batches["x"]
    assert (leaf.shape, leaf.ndim, leaf.nbytes, len(leaf)) == ((4, 2, 3), 3, whole.nbytes, 4)
    np.testing.assert_array_equal(np.asarray(leaf), whole)
    np.testing.assert_array_equal(leaf[2], whole[2])
    np.testing.assert_array_equal(leaf[np.array([3, 0])], whole[[3, 0]])
    np.testing.assert_array_equal(leaf[:, 1:2][np.array([[1], [2]])], whole[:, 1:2][[[1], [2]]])
    ids = np.array([[2, 2], [0, 1]])
    np.testing.assert_array_equal(data.gather(side, ids)["x"], whole[ids])
    np.testing.assert_array_equal(data.gather(side, ids)["y"], np.arange(8.0).reshape(4, 2)[ids])
    assert (side.num_batches, side.batch_size, side.num_samples) == (4, 2, 8)
    assert side.streamed and side.weights.sum() == pytest.approx(1)
    small = subsample(side, 2)
    assert not small.streamed
    np.testing.assert_array_equal(small.batches["x"], whole[[0, 3]])


def test_it_reads_what_is_asked_for_and_that_once():
    source = Counted(1000)
    side = side_of(source)
    source.read.clear()
    data.gather(side, np.array([7, 400]))
    assert sorted(source.read) == [14, 15, 800, 801]


@pytest.mark.parametrize(("n", "batch"), [(5, 2), (7, 4), (9, 4)])
def test_a_short_last_minibatch_is_padded_as_partition_pads(n, batch):
    x = np.arange(3) + 10 * np.arange(n)[:, None]
    side = side_of(Counted(n), batch)
    arrays = {"x": x, "y": np.arange(n, dtype=np.float32)}
    expected = data.partition(arrays, batch, shuffle=False)
    assert side.ragged and sorted(side.batches) == ["mask", "x", "y"]
    for name in side.batches:
        np.testing.assert_array_equal(np.asarray(side.batches[name]), expected.batches[name])
    np.testing.assert_allclose(side.weights, expected.weights)
    assert side.num_samples == n


def test_another_minibatch_that_is_short_is_an_error():
    ragged = grain.MapDataset.source(Counted(3)).batch(2).repeat()
    side = data.streamed(ragged, num_batches=4)
    with pytest.raises(ValueError, match=r"dataset\[1\] has 1 examples and dataset\[0\] has 2"):
        data.gather(side, np.array([1]))


X = np.ones((2, 3))
TWO, ONE = np.ones(2), np.ones(1)


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"y": X}, "must agree in their entries"),
        ({"x": X[:, :1]}, r"float64\[2, 1\] where dataset\[0\] has a float64\[2, 3\]"),
        ({"x": X[:0]}, r"dataset\[1\] has 0 examples"),
        ({"x": np.ones((3, 3))}, r"dataset\[1\] has 3 examples"),
        ({"x": X * 1j}, "agree in shapes and dtypes"),
    ],
)
def test_minibatches_of_another_kind_are_named_and_never_made_to_fit(last, says):
    with pytest.raises(ValueError, match=says):
        data.streamed([{"x": X}, last])


@pytest.mark.parametrize("name", ["mask", "example_mask"])
def test_padding_that_the_pipeline_made_itself_counts_as_none(name):
    side = data.streamed([{"x": X, name: TWO}, {"x": X, name: np.array([1.0, 0.0])}])
    assert side.num_samples == 3 and side.ragged
    np.testing.assert_allclose(side.weights, [2 / 3, 1 / 3])
    assert set(side.batches) == {"x", name}
    with pytest.raises(ValueError, match="none where all have a mask"):
        data.streamed([{"x": X, name: TWO}, {"x": X[:1], name: ONE}])
    early = data.streamed([{"x": X, name: TWO}, {"x": X, name: 0 * TWO}, {"x": X, name: TWO}])
    with pytest.raises(ValueError, match="marks padding: only the last minibatch"):
        data.gather(early, np.array([1]))


def test_a_mask_of_tokens_is_the_users_own():
    tokens = [{"x": np.ones((2, 3)), "mask": np.ones((2, 3))}]
    side = data.streamed([*tokens, jax.tree.map(lambda leaf: leaf[:1], tokens[0])])
    assert side.batches["mask"].shape == (2, 2, 3)
    assert side.batches["example_mask"].tolist() == [[1, 1], [1, 0]]
    side = data.partition({"x": np.ones(3), "mask": np.ones((3, 2))}, 2)
    assert side.ragged and side.batches["example_mask"].tolist() == [[1, 1], [1, 0]]


def test_an_endless_one_needs_a_number():
    endless = grain.MapDataset.source(Counted(4)).repeat().batch(2)
    with pytest.raises(ValueError, match="num_batches"):
        data.streamed(endless)
    side = data.streamed(endless, num_batches=5)
    np.testing.assert_array_equal(side.batches["y"][4], side.batches["y"][0])


@pytest.mark.parametrize(
    ("dataset", "error", "says"),
    [
        (iter([]), TypeError, "MapDataset"),
        ([], ValueError, "0 minibatches"),
        ([3], TypeError, "dict of arrays"),
        ([{"x": np.ones(2), "y": np.ones(3)}], ValueError, "leading length"),
        ([{"x": 1.0}], ValueError, "leading length"),
    ],
)
def test_mistakes_are_named(dataset, error, says):
    with pytest.raises(error, match=says):
        data.streamed(dataset)


def test_it_goes_to_the_device_in_one_piece_on_request():
    from bilevel_flax.train.device_feed import DeviceFeed

    side = side_of(Counted(8))
    sampler = data.Sampler(side.num_batches, 0)
    whole = DeviceFeed(side, sampler, True, 10)
    assert isinstance(whole.batches["x"], jax.Array)
    chunked = DeviceFeed(side, sampler, False, 10)
    chunked.seek(0)
    rows, ids = chunked.positions(0, 4)
    np.testing.assert_array_equal(chunked.batches["x"][rows], whole.batches["x"][ids])
    chunked.close()


def test_a_mesh_gets_the_same_minibatches():
    from bilevel_flax.sharding import Layout, make_mesh

    side = side_of(Counted(16), batch=4)
    layout = Layout(make_mesh("data=2", devices=jax.devices()[:2]))
    ids = np.array([3, 0])
    placed = layout.place_batches(side.batches, ids)
    assert len(placed["x"].addressable_shards) == 2
    for name in ("x", "y"):
        np.testing.assert_array_equal(placed[name], data.gather(side, ids)[name])
