"""The ROC curve and its area against their definitions."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from examples.mnist_hypercleaning.ranking import roc_curve, wrong_label_auc

pairs = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30)


@given(pairs)
def test_the_area_is_the_chance_of_the_right_order(examples: list[tuple[int, bool]]):
    weights = np.array([weight for weight, _ in examples], np.float32)
    wrong = np.array([is_wrong for _, is_wrong in examples])
    area = wrong_label_auc(weights, wrong)
    if wrong.all() or not wrong.any():
        assert math.isnan(area)
        return
    below = weights[wrong][:, None] < weights[~wrong][None, :]
    equal = weights[wrong][:, None] == weights[~wrong][None, :]
    np.testing.assert_allclose(area, (below + 0.5 * equal).mean(), rtol=1e-12)


def test_the_curve_climbs_at_once_where_the_order_is_perfect():
    false_alarms, found = roc_curve(np.array([0.9, 0.1, 0.8, 0.2]), np.array([0, 1, 0, 1], bool))
    assert false_alarms.tolist() == [0, 0, 0, 0.5, 1]
    assert found.tolist() == [0, 0.5, 1, 1, 1]


def test_a_tie_is_one_step():
    false_alarms, found = roc_curve(np.zeros(4), np.array([0, 1, 0, 1], bool))
    assert (false_alarms.tolist(), found.tolist()) == ([0, 1], [0, 1])
