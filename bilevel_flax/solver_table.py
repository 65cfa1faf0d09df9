"""The methods at a glance, for `bilevel-flax solvers`."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One method.

    Attributes:
        name: as in `bilevel_flax.NAME`.
        units: gradient units of one step (gradient, HVP and cross-JVP count 1 each).
        memory: what it keeps beside z, v, x and the optimisers; p parameters, N and M minibatches.
        use: when to choose it.
    """

    name: str
    units: str
    memory: str
    use: str


ROWS = (
    Row("soba", "4", "nothing", "the default: any network, any data, augmentation, BatchNorm"),
    Row("inner_only", "1", "nothing", "the baseline: plain training with x fixed"),
)


def render() -> str:
    """The table as text."""
    rows = [Row("solver", "units a step", "extra memory", "use it for"), *ROWS]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        + f"  {row.use}"
        for row in rows
    )
