"""What an image looks like to a network that has hardly learned: the source of `instance` noise."""

from __future__ import annotations

import numpy as np
import optax

from bilevel_flax.recipes.networks import as_network
from bilevel_flax.recipes.training import Trainer
from examples.mnist_hypercleaning.model import MLP

_EXAMPLES, _STEPS, _BATCH = 500, 200, 64


def confused(images: np.ndarray, labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Probabilities float32 [n, num_classes] of a small network after 200 steps on 500 true labels.

    Args:
        images: standardised, float32 [n, ...].
        labels: the true ones, int [n].
        num_classes: classes.
        seed: of the network and its minibatches.
    """
    trainer = Trainer(
        network=as_network(MLP(num_classes, hidden=64)),
        inputs=images,
        num_clean=0,
        num_classes=num_classes,
        batch_size=_BATCH,
        optimizer=lambda steps: optax.adam(1e-3),
        penalty=lambda params: 0.0,
        seed=seed,
    )
    rows = np.arange(min(_EXAMPLES, len(labels)))
    return trainer.probabilities(trainer.fit(rows, labels, _STEPS), images)
