"""The first training: when it stops, and what a clean example weighs."""

import types
from typing import Any

import flax.linen as nn
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.recipes import through_noise
from bilevel_flax.recipes.networks import as_network
from bilevel_flax.recipes.training import Trainer


def course(likelihoods) -> Any:
    return types.SimpleNamespace(likelihoods=np.asarray(likelihoods))


@pytest.mark.parametrize(
    ("ahead", "other"),
    [([0.4, 0.1, 0.4, 0.1], True), ([1.0, -1.0, 1.0, -0.9], False), ([-0.1] * 4, False)],
)
def test_the_smaller_weight_is_taken_where_held_out_labels_are_likelier_by_a_standard_error(
    ahead, other
):
    courses = [course(np.zeros(4)), course(ahead)]
    assert through_noise._likelier(courses) is courses[other]


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(256)(x)))


def data(apart, flipped, n=1000, clean=20):
    """Two Gaussians in 20 dimensions; class 0 is flipped to 1 with a probability."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 2, n + clean).astype(np.int32)
    x = rng.normal(size=(n + clean, 20)).astype(np.float32)
    x[:, 0] += apart * (2 * true - 1)
    labels = np.where((rng.random(n + clean) < flipped) & (true == 0), 1, true)
    labels[n:] = true[n:]
    return x, labels.astype(np.int32)


@pytest.fixture(scope="module")
def found():
    def run(apart, flipped):
        x, labels = data(apart, flipped)
        trainer = Trainer(
            as_network(Wide()), x, 20, 2, 32, lambda steps: optax.adam(3e-3), lambda z: 0.0, 0
        )
        training = through_noise.ThroughNoise(trainer, 300)
        return training.fit(np.arange(1000), labels, held=np.arange(500), pilot=150)

    return {"overlap": run(0.5, 0.0), "flipped": run(3.0, 0.45)}


def test_clean_examples_weigh_less_where_classes_overlap(found):
    assert found["overlap"].clean_weight == pytest.approx(3 * 20 / 1000)
    assert found["flipped"].clean_weight == through_noise._MOST


def test_what_the_pilot_costs(found):
    # 300 + 150 steps of 32 + 8 examples, and at most 6 + 3 looks at 500 labels, a third of a step.
    steps = 450 * 1.25
    assert all(steps < one.cost <= steps + 9 * 500 / 32 / 3 for one in found.values())
    assert all(one.piloted for one in found.values())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("steps", "pilot", "spent", "looks"),
    [
        (60, 30, 60 + 50, 3),  # after 50, twice, and after 60
        (190, 95, 190 + 100, 6),  # after 50 and 100, twice, and after 150 and 190
    ],
)
def test_a_pilot_ends_where_compiled_steps_do_with_a_look_and_looks_go_on(
    steps, pilot, spent, looks
):
    x, labels = data(3.0, 0.2, n=200)
    trainer = Trainer(
        as_network(Wide()), x, 20, 2, 32, lambda steps: optax.adam(3e-3), lambda z: 0.0, 0
    )
    found = through_noise.ThroughNoise(trainer, steps).fit(
        np.arange(200), labels, held=np.arange(50), pilot=pilot
    )
    assert found.cost == pytest.approx(spent * 1.25 + looks * 50 / 32 / 3)


def test_a_step_that_falls_is_told_how_long_a_training_is():
    x, labels = data(3.0, 0.2)
    lengths = []

    def optimizer(steps):
        lengths.append(steps)
        return optax.adam(optax.linear_schedule(1e-2, 0.0, steps))

    cleaned = bf.recipes.clean(
        Wide(), (x[:1000], labels[:1000]), (x[1000:], labels[1000:]), steps=100, optimizer=optimizer
    )
    assert sorted(set(lengths)) == [50, 100]
    assert cleaned.plain_step_equivalents < 4.1
    with pytest.raises(TypeError, match="optimizer"):
        bf.recipes.clean(
            Wide(),
            (x[:1000], labels[:1000]),
            (x[1000:], labels[1000:]),
            optimizer=lambda n: n,  # pyright: ignore[reportArgumentType]
        )
