"""Architecture logits: for each edge of a cell a learned mixture of operations.

x holds one row of logits for each edge, and an edge computes Σ_o softmax(x)_o · operation_o. What
is done with the mixtures when the search is over is a matter of the search (`examples/darts`);
`sharpened`, an optimiser of x under which they decide themselves, is softmax(x / τ) with a τ that
falls.

References:
    H. Liu, K. Simonyan, Y. Yang. DARTS: Differentiable architecture search. ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import deprecated
from bilevel_flax.base import PyTree
from bilevel_flax.checks import check_count


class Architecture(NamedTuple):
    """A parametrisation of mixed operations.

    Attributes:
        init: `init(rng) -> x`, the logits float32 [edges, operations] of each cell, by name.
        weights: `weights(x) -> {cell: [edges, operations]}`, what each operation counts for; every
            row sums to 1.
        operations: their names, in the order of the columns.

    Example:
        >>> import jax, bilevel_flax as bf
        >>> cell = bf.outer.architecture.mixture({"cell": 2}, ("none", "skip"))
        >>> cell.operations, cell.weights(cell.init(jax.random.key(0)))["cell"].shape
        (('none', 'skip'), (2, 2))
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
    if not edges:
        raise ValueError("edges={}: give the number of edges, 1 or more, of each cell")
    for cell, count in edges.items():
        check_count(f"edges[{cell!r}]", count)

    def init(rng):
        keys = jax.random.split(rng, len(edges))
        return {
            cell: spread * jax.random.normal(key, (count, len(names)))
            for (cell, count), key in zip(edges.items(), keys, strict=True)
        }

    def weights(outer_params):
        return jax.tree.map(lambda logits: jax.nn.softmax(logits, axis=-1), outer_params)

    return Architecture(init, weights, names)


class SharpenedState(NamedTuple):
    """State of `sharpened`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> tx = bf.outer.architecture.sharpened(optax.sgd(0.1), lambda step: 1.0 + step)
        >>> int(tx.init({"cell": jnp.zeros((2, 2))}).count)
        0
    """

    count: jax.Array  # int32, steps taken
    inner: Any  # of the optimiser that moves x


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
    step = optax.with_extra_args_support(transform)

    def init(params):
        return SharpenedState(jnp.zeros((), jnp.int32), step.init(params))

    def update(updates, state, params=None, **extra_args):
        moved, inner = step.update(updates, state.inner, params, **extra_args)
        growth = sharpness(state.count + 1) / sharpness(state.count) - 1
        grown = jax.tree.map(lambda u, x: u + jnp.asarray(growth, x.dtype) * x, moved, params)
        return grown, SharpenedState(jnp.asarray(optax.safe_increment(state.count)), inner)

    return optax.GradientTransformationExtraArgs(init, update)


__getattr__ = deprecated.names(__name__)
