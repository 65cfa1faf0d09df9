"""Means of per-step values between two log lines; they survive a checkpoint to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bilevel_flax import deprecated
from bilevel_flax.base import Info


class MetricAccumulator:
    """Adds up per-step values, and gives their means.

    Args:
        saved: sums as hexadecimal floats, from `state`.
        count: steps in them.
    """

    def __init__(self, saved: Mapping[str, str] | None = None, count: int = 0):
        self._sums = {name: float.fromhex(value) for name, value in (saved or {}).items()}
        self._count = count

    def add(self, info: Info) -> None:
        """Adds a chunk of steps, leaves [steps]."""
        for name, steps in _by_name(info).items():
            # Summed one by one: the result must not depend on where chunks end.
            values = np.append(self._sums.get(name, 0.0), np.asarray(steps, np.float64))
            self._sums[name] = float(np.add.accumulate(values)[-1])
        self._count += len(info.inner_loss)

    def means(self) -> dict[str, float]:
        """The mean of every value since it was made."""
        return {name: total / self._count for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """What `MetricAccumulator(**state)` goes on from, fit for JSON."""
        return {"saved": {k: v.hex() for k, v in self._sums.items()}, "count": self._count}


def _by_name(info: Info) -> dict[str, Any]:
    losses = {"inner_loss": info.inner_loss, "outer_loss": info.outer_loss}
    return {
        **{name: loss for name, loss in losses.items() if loss is not None},
        "norm_inner": info.norms.inner,
        "norm_adjoint": info.norms.adjoint,
        "norm_outer": info.norms.outer,
        **info.metrics,
    }


__getattr__ = deprecated.names(__name__)
