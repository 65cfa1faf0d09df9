"""Ready-made outer parameters and optimisers for them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bilevel_flax.outer import architecture, sample_weights
from bilevel_flax.outer.goals import goals
from bilevel_flax.outer.labels import SoftLabels, labels
from bilevel_flax.outer.meta_weight_net import meta_weight_net
from bilevel_flax.outer.optimisers.lazy import lazy_adam, lazy_sgd
from bilevel_flax.outer.optimisers.learned import learned_optimizer
from bilevel_flax.outer.optimisers.normalized import normalized_sgd
from bilevel_flax.outer.optimisers.robust import robust_sgd
from bilevel_flax.outer.sample_weights import SampleWeights, sigmoid, softmax

if TYPE_CHECKING:
    from bilevel_flax.outer import augmentation
    from bilevel_flax.outer.augmentation import image_policy, signal_policy
    from bilevel_flax.outer.data_mixture import (
        DataMixture,
        Selected,
        domain_weights,
        network_weights,
        select,
    )

__all__ = [
    "DataMixture",
    "SampleWeights",
    "architecture",
    "augmentation",
    "image_policy",
    "Selected",
    "SoftLabels",
    "domain_weights",
    "goals",
    "labels",
    "lazy_adam",
    "lazy_sgd",
    "learned_optimizer",
    "meta_weight_net",
    "network_weights",
    "normalized_sgd",
    "robust_sgd",
    "sample_weights",
    "select",
    "sigmoid",
    "signal_policy",
    "softmax",
]

# Imported when they are first asked for: few tasks need them.
_MIXTURE = ("DataMixture", "Selected", "domain_weights", "network_weights", "select")
_LATE = {
    **dict.fromkeys(("augmentation", "image_policy", "signal_policy"), "augmentation"),
    **dict.fromkeys(_MIXTURE, "data_mixture"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LATE[name]}")
    return module if name == "augmentation" else getattr(module, name)
