"""From learned shares to discrete cells when the last shares are not to be trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_flax.outer import architecture
from bilevel_flax.train.metrics import read_metrics
from examples.darts import genotype
from examples.darts.shares import read_shares


def before_rise(workdir: Path, weights: Any) -> tuple[int, Any]:
    """(step, shares) where the adjoint's residual starts to rise for good, see `architecture`.

    Args:
        workdir: of the run, whose metrics are read.
        weights: the last shares, taken where nothing was logged.
    """
    steps, shares = read_shares(workdir)
    rows = read_metrics(workdir / "metrics.jsonl") if steps else []
    rows = [row for row in rows if "adjoint_residual" in row]
    if not rows:
        return 0, weights
    signal = [row["adjoint_residual"] for row in rows]
    stop = rows[architecture.stop_before_rise(signal, window=max(1, len(signal) // 10))]["step"]
    at = max(0, int(np.searchsorted(steps, stop, side="right")) - 1)
    return steps[at], {cell: values[at] for cell, values in shares.items()}


def perturbed(error: Callable[[Any], float], weights: Any) -> dict[str, np.ndarray]:
    """Shares in which each edge has the operation whose removal hurts most, and `none`.

    How strong an edge is stays what its strongest operation's share was, so that `derive` keeps
    the same edges.

    Args:
        error: `error(shares)` of the trained supernet, on held-out data.
        weights: the learned shares.
    """
    found = {}
    none = genotype.OPERATIONS.index("none")
    for cell, values in weights.items():
        score = lambda tried, cell=cell: -error({**weights, cell: tried})
        names = architecture.select_by_perturbation(
            score, values, genotype.OPERATIONS, leave_out=("none",)
        )
        strength = np.delete(np.asarray(values, np.float64), none, axis=1).max(1)
        rows = np.zeros(np.shape(values))
        rows[np.arange(len(names)), [genotype.OPERATIONS.index(name) for name in names]] = strength
        rows[:, none] = 1 - strength
        found[cell] = rows
    return found
