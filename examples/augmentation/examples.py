"""What a run learns from: examples of one kind, and the invariance that is planted in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

Part = tuple[np.ndarray, np.ndarray]  # float32 [n, ...], int32 [n]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Three parts of labelled images or signals.

    Attributes:
        train: without the planted variation.
        validation: with it; F's.
        test: with it, like the validation examples.
        num_classes: classes.
        class_names: a name for each.
        planted: operation -> {"magnitude", "probability"}, numbers or one for each class; empty
            where nothing is planted.
        mean: what the network subtracts.
        deviation: what it then divides by.
    """

    train: Part
    validation: Part
    test: Part
    num_classes: int
    class_names: tuple[str, ...]
    planted: Mapping[str, Mapping[str, Any]]
    mean: float
    deviation: float
