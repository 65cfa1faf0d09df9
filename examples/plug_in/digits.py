"""Real handwritten digits, a share of the training labels replaced: what the six loops train on.

The data are scikit-learn's `load_digits` (1,797 images of 8 x 8), which come with the package.
"""

from __future__ import annotations

import numpy as np

from bilevel_flax.distribution import extras

with extras.named():
    import sklearn.datasets
    from sklearn.metrics import roc_auc_score

NUM_CLASSES = 10
_SPLITS = (1200, 200)  # training, validation; the remaining 397 are test images


def load(noise: float = 0.5, seed: int = 0):
    """Three parts, dicts of `image` float32 [n, 8, 8, 1] in [0, 1] and `label` int32 [n].

    Args:
        noise: share of the training labels that are redrawn from the nine other classes; the
            validation and test labels are clean.
        seed: of the split and of the noise.

    Returns:
        (train, validation, test, is_wrong), the last one bool [n]: what the loops must find out.
    """
    rng = np.random.default_rng(seed)
    pixels, targets = map(np.asarray, sklearn.datasets.load_digits(return_X_y=True))
    order = rng.permutation(len(targets))
    images = (pixels[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = targets[order].astype(np.int32)
    train, validation, test = (
        {"image": image, "label": label}
        for image, label in zip(
            np.split(images, np.cumsum(_SPLITS)), np.split(labels, np.cumsum(_SPLITS)), strict=True
        )
    )
    is_wrong = rng.random(len(train["label"])) < noise
    shift = rng.integers(1, NUM_CLASSES, len(is_wrong))
    train["label"] = np.where(is_wrong, (train["label"] + shift) % NUM_CLASSES, train["label"])
    train["label"] = train["label"].astype(np.int32)
    return train, validation, test, is_wrong


class Examples:
    """A dict of arrays as a data source: one example at a time, as Grain reads them."""

    def __init__(self, arrays):
        self._arrays = arrays

    def __len__(self):
        return len(self._arrays["label"])

    def __getitem__(self, index):
        return {name: array[index] for name, array in self._arrays.items()}


def batches(arrays, batch_size: int = 50, seed: int = 0):
    """Minibatches of a dict of arrays for ever, in a new order each epoch."""
    rng = np.random.default_rng(seed)
    size = len(arrays["label"])
    while True:
        order = rng.permutation(size)
        for start in range(0, size - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield {name: array[chosen] for name, array in arrays.items()}


def found(weights, is_wrong) -> float:
    """How well low weights single out the wrong labels: the area under the ROC curve."""
    return float(roc_auc_score(is_wrong, -np.asarray(weights)))
