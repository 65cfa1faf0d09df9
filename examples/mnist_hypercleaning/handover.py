"""The network that one would hand over, and what it says about the labels: `recipes.clean`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf
from examples.mnist_hypercleaning.ranking import wrong_label_auc

# What `summary.json` says about it.
KEYS = (
    "test_error_handover",
    "wrong_label_auc",
    "corrected_label_accuracy",
    "plain_step_equivalents",
)
# Of ‖z‖²: the published coefficient of the linear model is for a run with weights.
_PENALTY = 1e-4


def penalty(params: Any) -> jax.Array:
    """1e-4 times the sum of the squares of all matrices."""
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    return jnp.asarray(_PENALTY * sum(jnp.sum(leaf**2) for leaf in matrices))


def clean(
    config: Any, model: nn.Module, examples: Any, log: Callable[[str], None]
) -> bf.recipes.Cleaned:
    """Cleans the run's labels; the validation examples are the clean ones, no test example is seen.

    Args:
        config: keys `steps`, `batch_size`, `seed`.
        model: the network.
        examples: the run's data.
        log: prints a line.
    """
    return bf.recipes.clean(
        model,
        (examples.train_images, examples.given_labels),
        (examples.validation_images, examples.validation_labels),
        steps=config.steps,
        batch_size=min(config.batch_size, len(examples.given_labels)),
        penalty=penalty,
        seed=config.seed,
        log=lambda line: log(f"hand-over, {line}"),
    )


def results(cleaned: bf.recipes.Cleaned, examples: Any) -> dict[str, float]:
    """`KEYS`, by the true labels."""
    predicted = cleaned.predict(examples.test_images).argmax(1)
    right = cleaned.suggested_label == examples.true_labels
    values = (
        np.mean(predicted != examples.test_labels),
        wrong_label_auc(-cleaned.wrong_probability, examples.is_wrong),
        np.mean(right),
        cleaned.plain_step_equivalents,
    )
    return dict(zip(KEYS, map(float, values), strict=True))
