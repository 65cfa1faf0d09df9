"""Prefetching: the same data in the same order, errors passed on, threads that end."""

import gc
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from bilevel_flax import data


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "bilevel_flax-prefetch"]


def wait_for_no_threads():
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not prefetch_threads()


@pytest.mark.parametrize("per_step", [1, 2])
def test_chunks_are_the_samplers_minibatches_on_the_device(per_step):
    parts = data.partition({"x": np.random.default_rng(0).normal(size=(23, 2))}, 4)
    sampler = data.Sampler(parts.num_batches, seed=1, per_step=per_step)
    with data.chunks(parts, (sampler.ids(s, s + 5) for s in range(0, 20, 5))) as chunks:
        sent = list(chunks)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(sent))
    for name in ("x", "index", "mask"):
        got = np.concatenate([np.asarray(chunk[name]) for chunk in sent])
        np.testing.assert_allclose(got, parts.batches[name][sampler.ids(0, 20)], rtol=1e-6)
    assert wait_for_no_threads()


def test_it_runs_ahead_and_only_so_far():
    made = []
    with data.Prefetcher(lambda i: made.append(i) or i, itertools.count(), depth=3) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3, 4]


def test_an_exception_comes_where_the_value_would_have():
    def make(i):
        if i == 2:
            raise KeyError("the third")
        return i

    ahead = data.Prefetcher(make, range(5))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(KeyError, match="the third"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    assert wait_for_no_threads()


def test_exceptions_of_the_items_and_stop_iterations_of_make_are_no_silent_end():
    def items():
        yield 0
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(data.Prefetcher(lambda i: i, items()))
    with pytest.raises(RuntimeError, match="make raised StopIteration"):
        list(data.Prefetcher(lambda i: next(iter(())), range(3)))


def test_an_id_out_of_range_is_raised():
    parts = data.partition({"x": np.arange(8.0)}, 4)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 2\)"):
        list(data.chunks(parts, [np.array([0, 2])]))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_thread(taken):
    ahead = data.Prefetcher(lambda i: i, itertools.count())
    assert [next(ahead) for _ in range(taken)] == list(range(taken))
    ahead.close()
    ahead.close()
    assert not prefetch_threads()
    assert list(ahead) == []


def test_dropping_it_ends_the_thread():
    ahead = data.Prefetcher(lambda i: i, itertools.count())
    next(ahead)
    assert prefetch_threads()
    del ahead
    gc.collect()
    assert wait_for_no_threads()


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        data.Prefetcher(lambda i: i, [], depth=0)


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_fits_on_device():
    assert data.fits_on_device(10, limit=10) and not data.fits_on_device(11, limit=10)
    assert data.fits_on_device(1000) and not data.fits_on_device(2**60)
    device = Device({"bytes_limit": 1000, "bytes_in_use": 400})
    assert data.fits_on_device(300, device=device)
    assert not data.fits_on_device(301, device=device)
    assert data.fits_on_device(1000, device=Device(None))
