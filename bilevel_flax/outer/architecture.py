"""Architecture logits: for each edge of a cell a learned mixture of operations.

x holds one row of logits for each edge, and an edge computes Σ_o softmax(x)_o · operation_o. When
the search is over every edge keeps one operation. What there is against the collapse of a search
(all edges `skip_connect`) does not touch the solver: schedules are optimisers of x, selection and
stopping look at what was recorded.

* `sharpened`: x grows by a factor over the run, which is softmax(x / τ) with a τ that falls.
* `with_entropy`: adds c · ∇H(softmax(x)) to D_x, H the mean entropy of the edges; c > 0 commits.
* `select_by_perturbation`: on each edge the operation whose removal hurts most.
* `stop_before_rise`: where a curvature signal of the run leaves its lowest level for good.

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
    A. Zela, T. Elsken, T. Saikia, Y. Marrakchi, T. Brox, F. Hutter. Understanding and robustifying
    differentiable architecture search. ICLR 2020 (early stopping by curvature).
    R. Wang, M. Cheng, X. Chen, X. Tang, C.-J. Hsieh. Rethinking architecture selection in
    differentiable NAS. ICLR 2021 (selection by perturbation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.base import PyTree


class Architecture(NamedTuple):
    """A parametrisation of mixed operations.

    Attributes:
        init: `init(rng) -> x`, the logits float32 [edges, operations] of each cell, by name.
        weights: `weights(x) -> {cell: [edges, operations]}`, what each operation counts for; every
            row sums to 1.
        operations: their names, in the order of the columns.
    """

    init: Callable[[jax.Array], PyTree]
    weights: Callable[[PyTree], PyTree]
    operations: tuple[str, ...]


def mixture(
    edges: Mapping[str, int], operations: Sequence[str], spread: float = 1e-3
) -> Architecture:
    """Softmax mixtures: every edge of every cell weighs all operations.

    Args:
        edges: the number of edges by the name of the cell.
        operations: their names, alike for all edges.
        spread: standard deviation of the logits at the start.

    Raises:
        ValueError: no cells, no edges, fewer than two operations, names given twice.

    Example:
        >>> import jax
        >>> cells = mixture({"normal": 3}, ["none", "conv"])
        >>> cells.weights(cells.init(jax.random.key(0)))["normal"].shape
        (3, 2)
    """
    names = tuple(operations)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"operations={names!r}: give two or more, each once")
    if not edges or not all(isinstance(count, int) and count > 0 for count in edges.values()):
        raise ValueError(
            f"edges={dict(edges)!r}: give the number of edges, 1 or more, of each cell"
        )

    def init(rng):
        keys = jax.random.split(rng, len(edges))
        return {
            cell: spread * jax.random.normal(key, (count, len(names)))
            for (cell, count), key in zip(edges.items(), keys, strict=True)
        }

    def weights(outer_params):
        return jax.tree.map(lambda logits: jax.nn.softmax(logits, axis=-1), outer_params)

    return Architecture(init, weights, names)


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
    kept = [place for place, name in enumerate(operations) if name not in leave_out]
    if not kept:
        raise ValueError(f"leave_out={tuple(leave_out)!r} leaves no operation")
    return [operations[kept[int(np.argmax(row[kept]))]] for row in weights]


def entropy(weights: Any) -> Any:
    """The mean entropy of the edges, in nats: log(operations) where nothing is decided, 0 at last.

    Args:
        weights: [edges, operations], every row sums to 1.
    """
    return -jnp.mean(jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1))


def entropy_slope(logits: jax.Array) -> jax.Array:
    """∇ of `entropy(softmax(logits))`: -p_o (log p_o + H) of each edge, over the number of edges.

    Args:
        logits: [edges, operations].
    """
    logs = jax.nn.log_softmax(logits, axis=-1)
    shares = jnp.exp(logs)
    each = -jnp.sum(shares * logs, axis=-1, keepdims=True)
    return -shares * (logs + each) / each.size


class CountState(NamedTuple):
    """A wrapped optimiser's state, and the steps taken."""

    count: jax.Array  # int32
    inner: PyTree


def _counting(transform: optax.GradientTransformation, change: Callable) -> Any:
    """An optimiser around `transform`: `change(count, step, updates, params)` gives the updates."""
    step = optax.with_extra_args_support(transform)

    def init(params):
        return CountState(jnp.zeros((), jnp.int32), step.init(params))

    def update(updates, state, params=None, **extra_args):
        def move(updates):
            return step.update(updates, state.inner, params, **extra_args)

        moved, inner = change(state.count, move, updates, params)
        return moved, CountState(jnp.asarray(optax.safe_increment(state.count)), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def sharpened(
    transform: optax.GradientTransformation, sharpness: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """An optimiser of logits that also makes them grow: x ← x · s(t + 1) / s(t), then its step.

    softmax(s · y) with y learned and s on a schedule is the same as a temperature 1 / s that
    falls, and neither loss needs to know the step.

    Args:
        transform: moves x.
        sharpness: s, a positive schedule of the step count, usually 1 at the start.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> outer = sharpened(optax.sgd(1.0), lambda t: 1.0 + t)
        >>> x = jnp.array([0.5, -1.0])
        >>> update, _ = outer.update(jnp.array([0.0, 0.25]), outer.init(x), x)
        >>> (x + update).tolist()
        [1.0, -2.25]
    """

    def change(count, move, updates, params):
        moved, inner = move(updates)
        growth = sharpness(count + 1) / sharpness(count) - 1
        grown = jax.tree.map(lambda u, x: u + jnp.asarray(growth, x.dtype) * x, moved, params)
        return grown, inner

    return _counting(transform, change)


def with_entropy(
    transform: optax.GradientTransformation, coefficient: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Feeds D_x + c ∇H(softmax(x)) to an optimiser of logits: F is charged c for each nat.

    Args:
        transform: moves x.
        coefficient: c, in units of F's per nat, or a schedule: below 0 early keeps all operations
            in play, above 0 late makes every edge decide.
    """

    def change(count, move, updates, params):
        c = coefficient(count) if callable(coefficient) else coefficient
        return move(
            jax.tree.map(
                lambda d, x: d + jnp.asarray(c, d.dtype) * entropy_slope(x), updates, params
            )
        )

    return _counting(transform, change)


def select_by_perturbation(
    score: Callable[[np.ndarray], float],
    weights: Any,
    operations: Sequence[str],
    leave_out: Sequence[str] = (),
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

    Raises:
        ValueError: nothing is left, or the columns are not these.
    """
    now = np.array(weights, np.float32)
    strongest(now, operations, leave_out)  # checks
    kept = [place for place, name in enumerate(operations) if name not in leave_out]
    for edge in np.argsort(-now.max(-1), kind="stable"):
        scores = []
        for place in kept:
            without = now.copy()
            without[edge, place] = 0
            without[edge] /= max(without[edge].sum(), np.finfo(np.float32).tiny)
            scores.append(score(without))
        now[edge] = 0
        now[edge, kept[int(np.argmin(scores))]] = 1
    return strongest(now, operations, leave_out)


def stop_before_rise(signal: Sequence[float], window: int, ratio: float = 1.3) -> int:
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
