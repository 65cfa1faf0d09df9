"""The images of a search and of a training from scratch, as `config.data` names them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bilevel_flax import data
from bilevel_flax.train.config import ConfigError
from examples.datasets import sources


class Part(NamedTuple):
    """Standardised images float32 [n, height, width, channels] and labels int32 [n]."""

    image: np.ndarray
    label: np.ndarray


class Images(NamedTuple):
    """What a search sees; `test` only a trained network does.

    Attributes:
        train: of the inner loss.
        validation: of the outer loss.
        held_out: of neither.
        test: the source's test part.
        num_classes: classes.
    """

    train: Part
    validation: Part
    held_out: Part
    test: Part
    num_classes: int


def load_images(config: Any, splits: Any = None) -> Images:
    """Loads and splits what `config.data` asks for: (train, validation, test) and `held_out`.

    The first `held_out` examples of the validation part are kept from both losses.

    Args:
        config: keys `data.name`, `.manual_dir`, `.data_dir`, `.splits`, `.held_out`, `.seed`.
        splits: in the place of `config.data.splits`; None: these.

    Raises:
        ConfigError: splits that leave a part empty.
        ValueError: the data is not there.
    """
    splits = splits or config.data.splits
    whole = sources.load(
        config.data.name,
        manual_dir=config.data.manual_dir,
        data_dir=config.data.data_dir,
        splits=splits,
        seed=config.data.seed,
    )
    count, there = config.data.held_out, len(whole.validation_labels)
    if not 0 < count < there or not len(whole.train_labels):
        raise ConfigError(
            f"--config.data.held_out={count} with the splits {tuple(splits)}: both losses and the "
            "held-out part need examples"
        )
    train, validation, test = data.standardize(
        whole.train_images, whole.validation_images, whole.test_images
    )
    return Images(
        Part(train, whole.train_labels),
        Part(validation[count:], whole.validation_labels[count:]),
        Part(validation[:count], whole.validation_labels[:count]),
        Part(test, whole.test_labels),
        whole.num_classes,
    )


def all_training_images(images: Images) -> Part:
    """All that is not test data, for a training from scratch."""
    parts = (images.train, images.validation, images.held_out)
    return Part(
        np.concatenate([part.image for part in parts]),
        np.concatenate([part.label for part in parts]),
    )
