"""The optimisers of a run: z's, and the outer step of each parametrisation of the weights."""

from __future__ import annotations

from collections.abc import Callable

import optax

from bilevel_flax.train.config import check_choice

# Peak steps of z, as one would take them for the same network without weights.
INNER: dict[str, tuple[float, Callable[..., optax.GradientTransformation]]] = {
    "sgd": (0.1, optax.sgd),  # feels the weights, whose mean starts at .12
    "momentum": (0.01, lambda rate: optax.sgd(rate, momentum=0.9)),
    "adamw": (1e-3, lambda rate: optax.adamw(rate, weight_decay=1e-4)),
}
# What was published for the linear model; the others take AdamW, and the peaks above.
OWN_INNER = {"linear": "sgd"}
OWN_PEAK = {("linear", "sgd"): 0.01}

# Chosen on validation data (full MNIST, p = .7). A softmax logit scales a weight that may grow to
# thousands, so it must move more slowly than a sigmoid's: at .01 the inner problem cannot follow.
PEAK = {"sigmoid": 0.5, "softmax": 0.003}


def outer_rate(weights: str, steps: int, peak: float | None = None) -> optax.Schedule:
    """Falls linearly to 0 over the run.

    Args:
        weights: the parametrisation.
        steps: the run's steps.
        peak: where it starts; None: the parametrisation's own.
    """
    return optax.linear_schedule(PEAK.get(weights, 0.5) if peak is None else peak, 0.0, steps)


def inner_optimizer(
    name: str | None, model: str, steps: int, learning_rate: float | None = None
) -> optax.GradientTransformation:
    """The optimiser of z, its step falling linearly to 0 over the run.

    Args:
        name: `sgd`, `momentum` or `adamw`; None: the network's own.
        model: the network.
        steps: the run's steps.
        learning_rate: the first step; None: the optimiser's own.

    Raises:
        ConfigError: no such optimiser.
    """
    name = OWN_INNER.get(model, "adamw") if name is None else name
    check_choice(f"--config.inner={name}", name, INNER)
    _, make = INNER[name]
    peak = inner_peak(name, model) if learning_rate is None else learning_rate
    return make(optax.linear_schedule(peak, 0.0, steps))


def inner_peak(name: str, model: str) -> float:
    """The usual first step of z with that optimiser, for that network."""
    return OWN_PEAK.get((model, name), INNER[name][0])
