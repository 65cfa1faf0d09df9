"""The micro-space: a cell of four edges with five operations each, 625 networks in all.

Nodes 0 (the stem's output) to 3 (the cell's): the edges 0-1, 1-2 and 2-3 in a row, and 0-3 around
them; node 3 is the sum of the two paths. The operations are those of NAS-Bench-201.

A genotype is four operations, by name, in the order of EDGES. Many of the 625 are the same network
under another name: an edge in a row with `none` is dead, `skip_connect` in a row can be left out,
and two paths can change places. `canonical` gives one genotype for each of the 195 that differ.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from bilevel_flax.train.config import ConfigError, nearest
from examples.darts.operations import NAS_BENCH_201

EDGES = ((0, 1), (1, 2), (2, 3), (0, 3))
NODES = 4
OPERATIONS = tuple(NAS_BENCH_201)
Genotype = tuple[str, ...]
# What an operation outside of a row of them is: a path with nothing in it, or no path.
_Path = tuple[str, ...] | None


def genotypes() -> list[Genotype]:
    """All 625, in the order of their numbers."""
    return list(itertools.product(OPERATIONS, repeat=len(EDGES)))


def check(genotype: Sequence[str], where: str) -> Genotype:
    """The genotype as a tuple.

    Args:
        genotype: one operation for each edge.
        where: what the error calls its origin.

    Raises:
        ConfigError: an unknown operation, a wrong number of them.
    """
    if len(genotype) != len(EDGES):
        raise ConfigError(
            f"{where}: {len(genotype)} operations, but the micro-space has {len(EDGES)} edges: "
            "give one for each"
        )
    for name in genotype:
        if name not in OPERATIONS:
            raise ConfigError(
                f"{where}: unknown operation {name!r}, choose among {', '.join(OPERATIONS)}"
                f"{nearest(name, list(OPERATIONS))}"
            )
    return tuple(genotype)


def paths(genotype: Genotype) -> tuple[_Path, _Path]:
    """What stands between the two ends: (edges in a row, the edge around them)."""
    return _path(genotype[:3]), _path(genotype[3:])


def _path(operations: Sequence[str]) -> _Path:
    if "none" in operations:
        return None
    return tuple(name for name in operations if name != "skip_connect")


@functools.cache
def canonical(genotype: Genotype) -> Genotype:
    """The first of all genotypes that are the same network."""
    return _first_by_function()[_function(genotype)]


def _function(genotype: Genotype) -> tuple[_Path, ...]:
    # Two paths have no order; the same path twice is not the same as once.
    return tuple(sorted(paths(genotype), key=repr))


@functools.cache
def _first_by_function() -> dict[tuple, Genotype]:
    found: dict[tuple, Genotype] = {}
    for genotype in genotypes():
        found.setdefault(_function(genotype), genotype)
    return found


def distinct() -> list[Genotype]:
    """The 195 canonical ones."""
    return list(_first_by_function().values())
