"""The operations' shares over a run: as they are logged, and as they are read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bilevel_flax.train.metrics import read_metrics
from examples.darts import genotype

PREFIX = "_share/"  # for the files alone, see `Task.evaluate`


def named_shares(weights: Any) -> dict[str, float]:
    """The shares by names such as "_share/normal/0-2/skip_connect": cell, states, operation."""
    return {
        f"{PREFIX}{cell}/{start}-{end}/{operation}": float(share)
        for cell in genotype.CELLS
        for (start, end), row in zip(genotype.EDGES, np.asarray(weights[cell]), strict=True)
        for operation, share in zip(genotype.OPERATIONS, row, strict=True)
    }


def read_shares(workdir: Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """(steps, {cell: [steps, 14, 8]}): the shares over a run, from its metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    shape = (len(genotype.EDGES), len(genotype.OPERATIONS))
    names = list(named_shares({cell: np.zeros(shape) for cell in genotype.CELLS}))
    rows = read_metrics(path) if path.exists() else []
    rows = [row for row in rows if all(name in row for name in names)]
    values = np.array([[row[name] for name in names] for row in rows], np.float64)
    values = values.reshape(len(rows), len(genotype.CELLS), *shape)
    return (
        [int(row["step"]) for row in rows],
        {cell: values[:, i] for i, cell in enumerate(genotype.CELLS)},
    )
