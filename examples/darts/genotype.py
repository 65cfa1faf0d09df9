"""Genotypes of DARTS's space: two cells, derived from their weights, to JSON and back.

A cell has two inputs (states 0 and 1: the outputs of the two cells before it) and four nodes
(states 2 to 5), each the sum of operations on earlier states; its output is the four nodes side by
side. While searched for, a node has an edge from every earlier state, 2 + 3 + 4 + 5 = 14 in all; a
genotype keeps two for each node, with one operation each:

    {"space": "darts", "normal": [[["sep_conv_3x3", 0], ["skip_connect", 1]], ...], "reduce": ...}

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_flax.train.config import ConfigError, nearest

NODES = 4
INPUTS = 2
KEPT = 2  # edges into a node
OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
CELLS = ("normal", "reduce")
# (from state, to state), in the order in which the logits have their rows.
EDGES = tuple((start, node) for node in range(INPUTS, INPUTS + NODES) for start in range(node))
_SPACE = "darts"

Edge = tuple[str, int]  # (operation, the state that it comes from)
Cell = tuple[tuple[Edge, ...], ...]  # for each node its edges


class Genotype(NamedTuple):
    """Both cells, each with NODES nodes of KEPT edges (operation, state)."""

    normal: Cell
    reduce: Cell


def derive(weights: Mapping[str, Any]) -> Genotype:
    """The discrete cells, by DARTS's rule.

    An edge counts as much as its strongest operation, `none` left out; every node keeps the two
    that count most, with that operation.

    Args:
        weights: "normal" and "reduce": [14, 8], the operations' shares, EDGES by OPERATIONS. Not
            logits: these can be compared within an edge, but not between edges.

    Raises:
        ValueError: another shape, or rows that are no shares.
    """
    return Genotype(*(_derive_cell(weights[name], name) for name in CELLS))


def _derive_cell(weights: Any, name: str) -> Cell:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(EDGES), len(OPERATIONS)):
        raise ValueError(
            f"weights of {name} have shape {weights.shape}, not {(len(EDGES), len(OPERATIONS))}: "
            "one row for each edge, one column for each operation"
        )
    if not (np.all(weights >= 0) and np.allclose(weights.sum(1), 1, atol=1e-3)):
        raise ValueError(f"weights of {name}: every row must be shares that sum to 1, not logits")
    some = [index for index, operation in enumerate(OPERATIONS) if operation != "none"]
    cell = []
    for node in range(INPUTS, INPUTS + NODES):
        rows = [row for row, (_, end) in enumerate(EDGES) if end == node]
        strength = weights[np.ix_(rows, some)]
        best = np.argsort(-strength.max(1), kind="stable")[:KEPT]
        cell.append(
            tuple(
                (OPERATIONS[some[strength[start].argmax()]], int(start)) for start in sorted(best)
            )
        )
    return tuple(cell)


def random_genotype(seed: int) -> Genotype:
    """A cell drawn uniformly: two of the edges into each node, any operation but `none`."""
    rng = np.random.default_rng([seed, 6])

    def cell() -> Cell:
        return tuple(
            tuple(
                (OPERATIONS[rng.integers(1, len(OPERATIONS))], int(start))
                for start in sorted(rng.choice(node, KEPT, replace=False))
            )
            for node in range(INPUTS, INPUTS + NODES)
        )

    return Genotype(cell(), cell())


def share_of(genotype: Genotype, operation: str) -> float:
    """The share of edges that have this operation, in [0, 1]."""
    names = [name for cell in genotype for node in cell for name, _ in node]
    return names.count(operation) / len(names)


def collapsed(genotype: Genotype) -> bool:
    """Whether the normal cell holds nothing that can learn."""
    return not any("conv" in name for node in genotype.normal for name, _ in node)


def as_json(genotype: Genotype) -> dict[str, Any]:
    """What a genotype file holds."""
    cells = {
        name: [[[operation, start] for operation, start in node] for node in cell]
        for name, cell in zip(CELLS, genotype, strict=True)
    }
    return {"space": _SPACE, **cells}


def save(path: Path, genotype: Genotype) -> Path:
    """Writes a genotype file; returns its path."""
    cells = as_json(genotype)
    # One node a line: a person reads it.
    lines = [f'  "space": {json.dumps(cells.pop("space"))}']
    for name, nodes in cells.items():
        body = ",\n".join(f"    {json.dumps(node)}" for node in nodes)
        lines.append(f'  "{name}": [\n{body}\n  ]')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def load(path: str | Path) -> Genotype:
    """Reads a genotype file.

    Raises:
        ConfigError: no such file, no JSON, or what `check` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--genotype={path}: no such file; a search writes genotype.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): search again") from error
    return check(content, str(path))


def check(content: Any, where: str) -> Genotype:
    """The genotype that JSON stands for.

    Args:
        content: as `as_json` gives it.
        where: what the error calls its origin.

    Raises:
        ConfigError: a missing cell, a wrong number of nodes or edges, an unknown operation, an edge
            from a state that is not there yet.
    """
    if not isinstance(content, Mapping) or any(name not in content for name in CELLS):
        raise ConfigError(f'{where}: a genotype is {{"normal": [...], "reduce": [...]}}')
    if content.get("space", _SPACE) != _SPACE:
        raise ConfigError(
            f"{where}: a genotype of the space {content['space']!r}, not of {_SPACE!r}"
        )
    return Genotype(*(_checked_cell(content[name], f"{where}: {name}") for name in CELLS))


def _checked_cell(nodes: Any, where: str) -> Cell:
    if not isinstance(nodes, Sequence) or isinstance(nodes, str) or len(nodes) != NODES:
        count = len(nodes) if isinstance(nodes, Sequence) else 0
        raise ConfigError(f"{where} has {count} nodes, a cell of this space has {NODES}")
    cell = []
    for state, edges in enumerate(nodes, INPUTS):
        here = f"{where}, node {state - INPUTS}"
        if not isinstance(edges, Sequence) or len(edges) != KEPT:
            raise ConfigError(f'{here}: needs {KEPT} edges such as ["skip_connect", 0]')
        cell.append(tuple(_checked_edge(edge, state, here) for edge in edges))
    return tuple(cell)


def _checked_edge(edge: Any, state: int, where: str) -> Edge:
    if not isinstance(edge, Sequence) or isinstance(edge, str) or len(edge) != 2:
        raise ConfigError(f'{where}: {edge!r} is no edge such as ["skip_connect", 0]')
    name, start = edge
    if name not in OPERATIONS:
        raise ConfigError(
            f"{where}: unknown operation {name!r}, choose among {', '.join(OPERATIONS)}"
            f"{nearest(str(name), OPERATIONS)}"
        )
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < state:
        raise ConfigError(
            f"{where}: {name} comes from state {start!r}, but states 0 to {state - 1} come before"
        )
    return name, start
