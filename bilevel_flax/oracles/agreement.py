"""Whether two ways to the same arrays agree up to the rounding of their dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def disagreement(names: Sequence[str], ours: list, theirs: list, eps: float) -> str:
    """Which arrays differ most, if by more than rounding; else "".

    Args:
        names: of the arrays.
        ours: values, each measured by its own norm; then groups of gradients, each measured by the
            norm of its group, since a gradient may be zero but for rounding.
        theirs: the same from the reference.
        eps: the machine precision of the coarsest dtype.
    """
    allowed, errors = _allowed(eps), []
    for i, (group, other) in enumerate(zip(ours, theirs, strict=True)):
        pairs = [_finite(*pair) for pair in zip(group, other, strict=True)]
        sizes = [float(np.linalg.norm(b)) for _, b in pairs]
        least = np.linalg.norm(sizes) * (1 if i else min(8 * eps / allowed, 1) if allowed else 0)
        for (a, b), size in zip(pairs, sizes, strict=True):
            gap, size = float(np.linalg.norm(a - b)), max(size, least)
            errors.append(gap / size if size else gap)
    worst = max(range(len(errors)), key=lambda i: (np.isnan(errors[i]), errors[i]), default=None)
    if worst is None or errors[worst] <= allowed:
        return ""
    if np.isnan(errors[worst]):
        return f"{names[worst]} is not finite in one of them"
    return f"{names[worst]} by {errors[worst]:.2g} of the norm (rounding: {allowed:.2g})"


def compared(names: Sequence[str], theirs: list, eps: float) -> list[str]:
    """Which of these arrays `disagreement` would have found to be wrong."""
    sizes = [[np.linalg.norm(_finite(leaf, leaf)[1]) for leaf in group] for group in theirs]
    least = [0.0, *(_allowed(eps) * np.linalg.norm(np.array(group)) for group in sizes[1:])]
    large = [size > low for group, low in zip(sizes, least, strict=True) for size in group]
    return [name for name, flag in zip(names, large, strict=True) if flag]


def _allowed(eps: float) -> float:
    # Matrix units round factors to eight or ten bits, so float32 is no 24 bits there.
    return min(4 * eps**0.5, 0.05)


def _finite(*leaves: Any) -> list[np.ndarray]:
    """Two arrays as vectors, zero where neither is finite and both are the same."""
    kinds = (np.complex128 if jnp.iscomplexobj(leaf) else np.float64 for leaf in leaves)
    a, b = (np.asarray(leaf, kind).ravel() for leaf, kind in zip(leaves, kinds, strict=True))
    same = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
    return [np.where(same, 0, a), np.where(same, 0, b)]
