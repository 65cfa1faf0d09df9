"""The outer step of each parametrisation of the weights, in units of its logits."""

from __future__ import annotations

import optax

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
