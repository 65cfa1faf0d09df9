"""The sampler: every id once an epoch, a pure function of the position."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_flax.data import Sampler

samplers = st.builds(Sampler, st.integers(1, 40), st.integers(0, 3), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(samplers, st.integers(0, 5))
def test_every_id_exactly_once_an_epoch(sampler, epoch):
    n, k = sampler.num_batches, sampler.per_step
    stream = sampler.ids(0, -(-(epoch + 1) * n // k)).ravel()
    assert stream.dtype == np.int32
    assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(samplers, st.lists(st.integers(0, 150), min_size=3, max_size=3))
def test_ids_is_a_pure_function_of_the_position(sampler, cuts):
    a, b, c = sorted(cuts)
    again = Sampler(**json.loads(json.dumps(sampler.state())))
    parts = [again.ids(b, c), again.ids(a, b)]
    np.testing.assert_array_equal(np.concatenate(parts[::-1]), sampler.ids(a, c))
    shape = (c - a,) if sampler.per_step == 1 else (c - a, sampler.per_step)
    assert sampler.ids(a, c).shape == shape


def test_several_a_step_draw_the_same_stream():
    one, three = Sampler(7, seed=2), Sampler(7, seed=2, per_step=3)
    np.testing.assert_array_equal(three.ids(4, 9).ravel(), one.ids(12, 27))
    assert three.epoch(7) == 3


def test_orders_differ_between_epochs_and_seeds():
    sampler = Sampler(50, seed=0)
    assert (sampler.ids(0, 50) != sampler.ids(50, 100)).any()
    assert (sampler.ids(0, 50) != Sampler(50, seed=1).ids(0, 50)).any()


def test_all_orders_are_equally_likely():
    firsts = np.array([Sampler(3, seed).ids(0, 3) for seed in range(3000)])
    _, counts = np.unique(firsts @ [100, 10, 1], return_counts=True)
    assert len(counts) == 6
    assert abs(counts - 500).max() < 5 * np.sqrt(3000 * 5 / 36)


def test_far_positions_cost_nothing_extra():
    far = 10**12
    assert sorted(Sampler(10, seed=0).ids(far, far + 10)) == list(range(10))


def test_the_order_is_the_one_it_always_was():
    # A changed stream would silently break the resumption of every existing run.
    np.testing.assert_array_equal(Sampler(8, seed=0).ids(0, 8), [0, 4, 6, 3, 5, 7, 1, 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_batches": 9}, "num_batches=9 and this run has num_batches=8"),
        ({"seed": 1}, "seed=1 and this run has seed=0"),
        ({"per_step": 2}, "per_step=2 and this run has per_step=1"),
    ],
)
def test_another_runs_position_is_refused(change, words):
    sampler = Sampler(8, seed=0)
    sampler.check(sampler.state())
    with pytest.raises(ValueError, match=words):
        sampler.check({**sampler.state(), **change})


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match='no "seed"'):
        Sampler(8, seed=0).check({"num_batches": 8})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampler(0, 0), "num_batches must be an integer of at least 1, got 0"),
        (lambda: Sampler(3, 0, 0), "per_step must be an integer of at least 1, got 0"),
        (lambda: Sampler(3, -2), "non-negative integer, got -2"),
        (lambda: Sampler(3, 0).ids(4, 2), "start=4, stop=2"),
        (lambda: Sampler(3, 0).ids(-1, 2), "start=-1, stop=2"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
