"""The one split of MNIST that the published test errors were obtained on, from the original files.

5,000 validation and 20,000 training digits are drawn from the 60,000, and then the wrong labels,
by one generator with a fixed seed; all 10,000 test digits. Runs with other seeds differ in the
order of their minibatches only.

References:
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms. NeurIPS 2022 (and its public benchmark).
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from bilevel_flax import data
from bilevel_flax.train.config import ConfigError
from examples.datasets import originals
from examples.mnist_hypercleaning.task import SPLITS, Examples

_SEED = 32
_CLASSES = 10


def load_examples(folder: Path, corruption: float) -> Examples:
    """Reads the four original files and draws the published split.

    Args:
        folder: of the files, named as at their source.
        corruption: share of training labels drawn anew, in [0, 1].

    Raises:
        ConfigError: files are missing.
        ValueError: a file is not the original.
    """
    if absent := originals.missing("mnist", folder):
        raise ConfigError(f"--manual-dir={folder} lacks {', '.join(absent)}")
    images, labels = _read(folder, "train")
    test_images, test_labels = _read(folder, "t10k")
    rng = np.random.RandomState(_SEED)
    order = rng.permutation(len(labels))
    num_train, num_validation, _ = SPLITS
    validation, train = np.split(order[: num_validation + num_train], [num_validation])
    true = labels[train]
    drawn = rng.rand(num_train) < corruption
    given = true.copy()
    given[drawn] = rng.randint(0, _CLASSES, drawn.sum())
    standardized = data.standardize(images[train], images[validation], test_images)
    return Examples(
        train_images=standardized[0],
        given_labels=given,
        true_labels=true,
        is_wrong=given != true,
        validation_images=standardized[1],
        validation_labels=labels[validation],
        test_images=standardized[2],
        test_labels=test_labels,
        raw_train_images=images[train],
        num_classes=_CLASSES,
        class_names=tuple(map(str, range(_CLASSES))),
    )


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 28, 28, 1] and labels int32 [n], in the files' order."""
    images, labels = (
        gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
        for kind in ("images-idx3", "labels-idx1")
    )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)
