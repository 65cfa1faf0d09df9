"""A short run from config to summary, what is planted, compared policies, wrong settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bilevel_flax.outer.augmentation import image_policy
from bilevel_flax.train import config as configs
from bilevel_flax.train import experiment as train
from examples.augmentation import compared, images, signals, task

CONFIG = Path(__file__).parents[2] / "configs" / "augmentation.py"
SHORT = ["data.name=signals", "data.splits=(128,128,128)", "health.summary=False", "steps=4"]
SHORT += [
    "health.every=0",
    "eval_every=2",
    "uniform_magnitudes=(0.2,)",
    "operations=('time_shift','sign_flip')",
]


def test_a_run_writes_what_it_learned(tmp_path):
    config = configs.load(str(CONFIG), [*SHORT, "per_class=True"])
    summary = train.train_and_evaluate(config, tmp_path)
    assert set(summary["learned"]) == {"time_shift", "sign_flip"}
    assert np.shape(summary["learned"]["time_shift"]["magnitude"]) == (2,)
    assert summary["planted"]["time_shift"]["magnitude"] == [0.3, 0.0]
    assert set(summary["test_error"]) == {"search", "learned", "none", "random", "uniform"}
    assert all(0 <= error <= 1 for error in summary["test_error"].values())
    report = (tmp_path / "report.html").read_text()
    for title in ("Learned policy", "The policy over time", "before and after", "by policy"):
        assert title in report


def test_only_the_planted_class_varies():
    still, moved = (
        signals.draw(np.random.default_rng(0), 200, moved=moved) for moved in (False, True)
    )
    assert still[0].shape == (200, signals.LENGTH, signals.CHANNELS)
    spectrum = lambda part, label: np.abs(np.fft.rfft(part[0][part[1] == label], axis=1)).mean(
        (0, 2)
    )
    widths = {}
    for name, part in (("still", still), ("moved", moved)):
        for label in (0, 1):
            power = spectrum(part, label)[8:] ** 2
            place = np.arange(len(power))
            mean = (place * power).sum() / power.sum()
            widths[name, label] = ((place - mean) ** 2 * power).sum() / power.sum()
    assert widths["moved", 0] == pytest.approx(widths["still", 0], rel=0.1)
    assert widths["moved", 1] > 1.2 * widths["still", 1]


def test_planted_images_are_rotated_within_the_range():
    bar = np.zeros((50, 15, 15, 1), np.float32)
    bar[:, 7, 8:] = 1  # from the middle to the right
    turned = images.varied(bar, {"rotate": 60.0}, seed=1)
    y, x = np.mgrid[:15, :15] - 7
    weight = turned[..., 0]
    angle = np.degrees(np.arctan2(-(weight * y).sum((1, 2)), (weight * x).sum((1, 2))))
    assert np.abs(angle).max() < 62
    assert np.ptp(angle) > 90


def test_a_random_policy_is_as_strong_and_a_uniform_one_is_even():
    policy = image_policy(("flip", "rotate", "noise", "solarize"))
    x = policy.at(
        {
            "flip": {"probability": 0.04},
            "rotate": {"magnitude": 60.0, "probability": 0.9},
            "noise": {"magnitude": 0.1, "probability": 0.3},
            "solarize": {"magnitude": 0.2, "probability": 0.5},
        }
    )
    strengths = {k: float(v) for k, v in policy.strengths(x).items()}
    orders = set()
    for seed in range(5):
        other = {
            k: float(v)
            for k, v in policy.strengths(compared.shuffled(policy, x, seed=seed)).items()
        }
        np.testing.assert_allclose(sorted(other.values()), sorted(strengths.values()), rtol=1e-4)
        orders.add(tuple(np.round(list(other.values()), 4)))
    assert len(orders) > 1
    even = policy.learned(compared.uniform(policy, 0.3))
    assert even["rotate"]["magnitude"] == pytest.approx(27.0)
    assert [each["probability"] for each in even.values()] == pytest.approx([0.5] * 4)


@pytest.mark.parametrize(
    "override, message",
    [
        ("operations=('twist',)", "--config.operations: 'twist' is unknown"),
        ("limits.time_shift=0.9", r"--config.limits\['time_shift'\]=0.9 must lie in \(0, 0.5\]"),
        ("limits.rotate=45.0", r"--config.limits\['rotate'\]=45.0: the policy has no such"),
        ("magnitude=1.5", r"--config.magnitude=1.5 must lie in \(0, 1\)"),
        ("planted=rotate", "--config.planted=rotate: for images"),
        ("model=cnn", "--config.model=cnn: choose one of spectrum for signals"),
        ("batch_size=0", "--config.batch_size=0: must be 1 .. 128"),
        ("data.splits=(0,1,1)", "give three sizes above 0"),
    ],
)
def test_wrong_settings_name_their_key(override, message):
    config = configs.load(str(CONFIG), [*SHORT, override])
    with pytest.raises(configs.ConfigError, match=message):
        task.make_task(config)


def test_an_unknown_plan_and_a_size_that_does_not_divide():
    config = configs.load(str(CONFIG), ["planted=rotation"])
    with pytest.raises(
        configs.ConfigError, match="--config.planted=rotation: choose one of none, rot"
    ):
        task.make_task(config)
    with pytest.raises(configs.ConfigError, match="--config.data.size=13: must divide.*28 x 28"):
        images.smaller(np.zeros((2, 28, 28, 1), np.uint8), 13)
