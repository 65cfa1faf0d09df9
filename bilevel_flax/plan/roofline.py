"""How long a step takes at the least, on chips that reach their peak.

    compute    operations of the step / chips / peak
    memory     the state, read and written once, / HBM bandwidth
    network    bytes that rings of the collectives' sizes send / bandwidth of one ring

A step takes as long as the longest of the three if they overlap entirely, as their sum if they do
not overlap at all. Real steps reach 40 to 60 % of the compute's peak.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bilevel_flax.plan.collectives import Collective
from bilevel_flax.plan.topology import Chip

ASSUMPTIONS = (
    "matrix units at their bfloat16 peak; the state read and written once; each collective a ring "
    "along one axis of the torus, one after the other, none hidden behind another"
)


class Roofline(NamedTuple):
    """Seconds of a step by what bounds it."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        """The longest of the three."""
        return max(self._fields, key=lambda name: getattr(self, name))


def sent(found: Iterable[Collective], chips: int) -> float:
    """Bytes that one chip sends in a step, with ring algorithms."""
    total = 0.0
    for one in found:
        group = one.group_size or chips
        share = (group - 1) / group
        factor = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": group - 1,  # of the result, the group-th part of what goes in
            "all-to-all": share,
            "ragged-all-to-all": share,
        }.get(one.kind, 1.0)
        total += factor * one.bytes * one.count
    return total


def estimate(
    chip: Chip, chips: int, flops: float, state_bytes: int, found: Iterable[Collective]
) -> Roofline:
    """The three bounds.

    Args:
        chip: of the generation.
        chips: how many.
        flops: of the step, on all chips together.
        state_bytes: on one chip.
        found: the collectives of a step.

    Example:
        >>> from bilevel_flax.plan.topology import CHIPS
        >>> estimate(CHIPS["v5e"], 256, 197e12 * 256, 0, []).compute
        1.0
    """
    return Roofline(
        flops / chips / chip.flops,
        2 * state_bytes / chip.hbm_bandwidth,
        sent(found, chips) / chip.ring_bandwidth,
    )
