"""From learned shares to discrete cells, also when the last shares are not to be trusted.

References:
    A. Zela, T. Elsken, T. Saikia, Y. Marrakchi, T. Brox, F. Hutter. Understanding and robustifying
    differentiable architecture search. ICLR 2020 (early stopping by curvature).
    R. Wang, M. Cheng, X. Chen, X. Tang, C.-J. Hsieh. Rethinking architecture selection in
    differentiable NAS. ICLR 2021 (selection by perturbation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.train.metrics import read_metrics
from examples.darts import genotype
from examples.darts.shares import read_shares


def strongest(weights: Any, operations: Sequence[str], leave_out: Sequence[str] = ()) -> list[str]:
    """For each edge the name of the operation with the largest weight (DARTS's rule).

    Args:
        weights: [edges, operations], or logits: the order within an edge is the same.
        operations: names of the columns.
        leave_out: names that are never taken.

    Raises:
        ValueError: nothing is left, or the columns are not these.
    """
    weights = np.asarray(weights)
    if weights.shape[-1:] != (len(operations),):
        raise ValueError(f"weights have shape {weights.shape}, for operations {tuple(operations)}")
    places = [place for place, name in enumerate(operations) if name not in leave_out]
    if not places:
        raise ValueError(f"leave_out={tuple(leave_out)!r} leaves no operation")
    return [operations[places[int(np.argmax(row[places]))]] for row in weights]


def entropy(weights: Any) -> Any:
    """The mean entropy of the edges, in nats: log(operations) where nothing is decided, 0 at last.

    Args:
        weights: [edges, operations], every row sums to 1.
    """
    return -jnp.mean(jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1))


def select_by_perturbation(
    score: Callable[[np.ndarray], float],
    weights: Any,
    operations: Sequence[str],
    leave_out: Sequence[str] = (),
    settle: Callable[[np.ndarray], None] = lambda weights: None,
) -> list[str]:
    """For each edge the operation whose removal lowers the supernet's score most.

    Edges are decided one after the other, the most one-sided mixture first; a decided edge keeps
    its operation alone while the others are judged. `edges · operations` evaluations at most.

    Args:
        score: `score(weights [edges, operations]) -> float`, of the supernet with this mixture on
            validation data; higher is better.
        weights: [edges, operations], the mixture that was learned.
        operations: names of the columns.
        leave_out: names that are never taken.
        settle: `settle(weights)` after each edge but the last: the place to train the supernet on
            with the mixture that is left, as the paper does.

    Raises:
        ValueError: nothing is left, or the columns are not these.
    """
    now = np.array(weights, np.float32)
    strongest(now, operations, leave_out)  # checks
    places = [place for place, name in enumerate(operations) if name not in leave_out]
    for count, edge in enumerate(np.argsort(-now.max(-1), kind="stable"), 1):
        scores = []
        for place in places:
            without = now.copy()
            without[edge, place] = 0
            without[edge] /= max(without[edge].sum(), np.finfo(np.float32).tiny)
            scores.append(score(without))
        now[edge] = 0
        now[edge, places[int(np.argmin(scores))]] = 1
        if count < len(now):
            settle(now)
    return strongest(now, operations, leave_out)


def stop_before_rise(signal: Sequence[float] | np.ndarray, window: int, ratio: float = 1.3) -> int:
    """Where to stop: the last record before a smoothed signal stays above its lowest level.

    A curvature signal of the run, such as the adjoint's residual or the damping that follows it,
    falls while z settles; a search that collapses drives it up again.

    Args:
        signal: positive values, one for each record.
        window: records to average over.
        ratio: how far above the lowest average counts as a rise, > 1.

    Returns:
        The position of the record to take; the last one where the signal never rises.

    Raises:
        ValueError: an empty signal, or an argument out of range.
    """
    values = np.asarray(signal, np.float64)
    if not len(values) or window < 1 or not ratio > 1:
        raise ValueError(
            f"stop_before_rise: {len(values)} values, window={window}, ratio={ratio}: give values, "
            "a window of 1 or more and a ratio above 1"
        )
    window = min(window, len(values))
    smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
    lowest = np.minimum.accumulate(smooth)
    risen = np.flatnonzero(smooth > ratio * lowest)
    return len(values) - 1 if not len(risen) else max(0, int(risen[0]) + window - 2)


def before_rise(workdir: Path, weights: Any) -> tuple[int, Any]:
    """(step, shares) where the adjoint's residual starts to rise for good, see `stop_before_rise`.

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
    stop = rows[stop_before_rise(signal, window=max(1, len(signal) // 10))]["step"]
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
    chosen = {}
    none = genotype.OPERATIONS.index("none")
    for cell, values in weights.items():
        score = lambda tried, cell=cell: -error({**weights, cell: tried})
        names = select_by_perturbation(score, values, genotype.OPERATIONS, leave_out=("none",))
        strength = np.delete(np.asarray(values, np.float64), none, axis=1).max(1)
        rows = np.zeros(np.shape(values))
        rows[np.arange(len(names)), [genotype.OPERATIONS.index(name) for name in names]] = strength
        rows[:, none] = 1 - strength
        chosen[cell] = rows
    return chosen
