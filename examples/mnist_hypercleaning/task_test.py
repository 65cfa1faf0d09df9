"""The networks, their optimisers and parametrisations, and that nothing set finds wrong labels."""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_flax.train import config as configs
from bilevel_flax.train import experiment as train
from examples.mnist_hypercleaning import task
from examples.mnist_hypercleaning.model import StridedConv
from examples.mnist_hypercleaning.rates import inner_optimizer

CONFIG = Path(__file__).parents[2] / "configs" / "mnist_hypercleaning.py"
SMALL = ["data.splits=(600,200,200)", "epochs=10", "baselines=False", "eval_every=94"]
SMALL += ["health.every=0", "health.summary=False"]  # tests/train/train_test.py has them


@pytest.mark.parametrize("size", [(28, 28), (14, 7), (7, 9)])
def test_a_convolution_by_patches_is_the_convolution(size):
    images = jax.random.normal(jax.random.PRNGKey(0), (2, *size, 3))
    conv = StridedConv(5)
    params = conv.init(jax.random.PRNGKey(1), images)
    kernel = jnp.asarray(params["params"]["Dense_0"]["kernel"]).reshape(3, 3, 3, 5)
    usual = nn.Conv(5, (3, 3), strides=(2, 2), use_bias=False)
    found, wanted = conv.apply(params, images), usual.apply({"params": {"kernel": kernel}}, images)
    np.testing.assert_allclose(jnp.asarray(found), jnp.asarray(wanted), atol=1e-5)


def test_an_unknown_inner_optimizer_is_named_with_the_nearest():
    with pytest.raises(configs.ConfigError, match="--config.inner=adam: choose one of.*adamw"):
        inner_optimizer("adam", "cnn", 10)


@pytest.mark.parametrize("model, step", [("linear", 0.01), ("mlp", 0.1), ("cnn", 0.1)])
def test_sgd_takes_longer_steps_for_a_network_than_the_published_ones(model, step):
    inner = inner_optimizer("sgd", model, 10)
    one = {"z": jnp.ones(())}
    moved, _ = inner.update(one, inner.init(one))
    np.testing.assert_allclose(jax.tree.leaves(moved), [-step], rtol=1e-6)


def test_an_unknown_parametrisation_is_named_with_the_nearest():
    config = configs.load(str(CONFIG), [*SMALL, "weights=sigmoids"])
    with pytest.raises(configs.ConfigError, match="--config.weights=sigmoids.*sigmoid"):
        task.make_task(config)


@pytest.mark.parametrize(
    "setting, auc",
    [
        (["model=mlp"], 0.85),
        # Half a minute each, the same code; tests/train/train_test.py takes a few steps of the CNN.
        pytest.param(["model=cnn"], 0.85, marks=pytest.mark.slow),
        pytest.param(["model=cnn", "noise=class", "corruption=0.3"], 0.8, marks=pytest.mark.slow),
    ],
    ids=["mlp", "cnn", "cnn, class"],
)
def test_with_nothing_tuned_the_wrong_labels_are_found(setting, auc, tmp_path):
    summary = train.train_and_evaluate(configs.load(str(CONFIG), [*SMALL, *setting]), tmp_path)
    # A hundred steps are few for the weights, and for the trainings of the hand-over.
    assert min(summary["learned_weight_auc"], summary["wrong_label_auc"]) > auc
    assert 0 < summary["test_error_handover"] < 0.5 < summary["corrected_label_accuracy"] <= 1
    assert 3.25 < summary["plain_step_equivalents"] < 4.0
    assert summary["gradient_units_per_step"] == 4.0


def test_a_network_on_the_loss_finds_them_too(tmp_path):
    config = configs.load(str(CONFIG), [*SMALL, "model=mlp", "weights=meta_weight_net"])
    summary = train.train_and_evaluate(config, tmp_path)
    assert summary["learned_weight_auc"] > 0.75
    weights = np.load(tmp_path / "learned.npz")["weights"]
    assert weights.shape == (600,) and ((weights > 0) & (weights < 1)).all()
