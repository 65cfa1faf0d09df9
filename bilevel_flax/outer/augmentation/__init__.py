"""Augmentations whose magnitudes and probabilities are learned on validation data.

`IMAGE_OPERATIONS` and `SIGNAL_OPERATIONS` hold what a policy can be made of, by name.
"""

from bilevel_flax.outer.augmentation.kinds import (
    IMAGE_OPERATIONS,
    SIGNAL_OPERATIONS,
    image_policy,
    signal_policy,
    transform_images,
)
from bilevel_flax.outer.augmentation.operation import Operation
from bilevel_flax.outer.augmentation.policy import Policy
from bilevel_flax.outer.augmentation.signals import transform as transform_signals

__all__ = [
    "IMAGE_OPERATIONS",
    "SIGNAL_OPERATIONS",
    "Operation",
    "Policy",
    "image_policy",
    "signal_policy",
    "transform_images",
    "transform_signals",
]
