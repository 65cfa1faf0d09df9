"""When a network's word is worth more than the given labels, by arrays alone."""

import numpy as np
import pytest

from bilevel_flax.recipes.first_word import FirstWord

COUNT, CLASSES = 4000, 4


def posterior_of(evidence):
    powers = np.exp(evidence - evidence.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def network(apart, sharpness, seed=0):
    """Probabilities of a network that sees normal evidence, and the true labels.

    With sharpness 1 it is as sure as it is right.
    """
    rng = np.random.default_rng(seed)
    true = rng.integers(0, CLASSES, COUNT)
    evidence = rng.normal(size=(COUNT, CLASSES)) + apart * np.eye(CLASSES)[true]
    return posterior_of(sharpness * apart * evidence), true


def given_labels(true, wrong, seed=1):
    rng = np.random.default_rng(seed)
    redrawn = (true + rng.integers(1, CLASSES, COUNT)) % CLASSES
    return np.where(rng.random(COUNT) < wrong, redrawn, true)


HELD = np.arange(0, COUNT, 5)


@pytest.mark.parametrize(
    ("apart", "sharpness", "wrong", "expected"),
    [
        pytest.param(1.6, 1.0, 0.05, True, id="classes overlap, few labels are wrong"),
        pytest.param(0.5, 1.0, 0.4, True, id="the network is mostly wrong"),
        pytest.param(4.0, 1.0, 0.05, False, id="classes are apart, few labels are wrong"),
        pytest.param(4.0, 1.0, 0.5, False, id="classes are apart, half of the labels are wrong"),
        pytest.param(4.0, 0.04, 0.6, False, id="right, but hardly trained, so in doubt"),
    ],
)
def test_given_labels_are_preferred_where_they_are_the_better_evidence(
    apart, sharpness, wrong, expected
):
    said, true = network(apart, sharpness)
    given = given_labels(true, wrong)
    word = FirstWord(said, given, HELD)
    assert ((said.argmax(1) == true).mean() < (given == true).mean()) == expected
    assert word.prefers_given(said, said) == expected


def test_without_held_out_labels_the_later_networks_are_trusted():
    said, true = network(0.5, 1.0)
    word = FirstWord(said, given_labels(true, 0.05), HELD[:0])
    assert not word.prefers_given(said, said)
