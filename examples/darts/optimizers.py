"""Optimisers of networks, for a search and for a training from scratch."""

from __future__ import annotations

import optax

from bilevel_flax.train.config import ConfigError


def make_optimizer(
    learning_rate: float, steps: int, name: str = "momentum", weight_decay: float = 3e-4
) -> optax.GradientTransformation:
    """The optimiser of a network: clipped at 5, a cosine to 0.

    Args:
        learning_rate: the first.
        steps: of the run.
        name: "momentum" (SGD with .9, as in the paper) or "adamw".
        weight_decay: of the parameters.

    Raises:
        ConfigError: another name.
    """
    rate = optax.cosine_decay_schedule(learning_rate, max(1, steps))
    if name == "momentum":
        moved = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9))
    elif name == "adamw":
        moved = optax.adamw(rate, weight_decay=weight_decay)
    else:
        raise ConfigError(f"optimizer {name!r}: choose momentum or adamw")
    return optax.chain(optax.clip_by_global_norm(5.0), moved)
