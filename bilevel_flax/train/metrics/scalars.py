"""What a task's `evaluate` gives, as plain numbers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_OF_THE_RUN = (
    "step",
    "inner_loss",
    "outer_loss",
    "norm_inner",
    "norm_adjoint",
    "norm_outer",
    "oracle_units",
    "adjoint_residual",
    "hypergradient_cosine",
)


def number(name: str, value: ArrayLike) -> int | float:
    """The one number that a scalar of any array library holds.

    Raises:
        ValueError: `value` is no single number.
    """
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16 and its like have the kind of raw bytes
        array = array.astype(np.float32)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"scalar {name!r}: expected one number, got {value!r:.60} of shape {array.shape}"
        )
    if array.dtype == np.float32:
        # The shortest decimal that is this float32: 0.1, not 0.10000000149011612.
        return float(str(array.reshape(())[()]))
    return array.item()


def as_scalars(results: Any) -> dict[str, float]:
    """The numbers of an evaluation, by name.

    Args:
        results: a mapping of names to numbers, arrays with one element or `clu.metrics.Metric`s;
            or a `clu.metrics.Collection`. (Anything with `compute()` is a metric.)

    Raises:
        TypeError: it is neither.
        ValueError: a value is no single number; a name is empty, no text, or one of the run's own
            (`step`, `inner_loss` ...).

    Example:
        >>> as_scalars({"validation_error": np.float32(0.1)})
        {'validation_error': 0.1}
    """
    results = _computed(results)
    if not isinstance(results, Mapping):
        raise TypeError(
            f"evaluate: returned {results!r:.60}; return a dict of numbers by name, or a "
            "clu.metrics.Collection"
        )
    for name in results:
        if not isinstance(name, str) or not name.strip() or name in _OF_THE_RUN:
            raise ValueError(f"evaluate: a metric has the name {name!r}: give it another one")
    return {name: float(number(name, _computed(value))) for name, value in results.items()}


def _computed(value: Any) -> Any:
    """A metric's value; what is no metric stays as it is."""
    return value.compute() if callable(getattr(value, "compute", None)) else value
