"""SGD on x whose step does not depend on the scale of D_x: nothing to tune per data set.

The direction of per-sample weights scales as 1/n, and its size depends on the loss and on the
inner curvature, which is why the good SGD step for hypercleaning lies anywhere between 1e2 and
1e4. Dividing a leaf's direction by its own root mean square removes the scale:

    s_t = β s_{t-1} + (1 - β) mean(D_x²)        x -= γ D_x / (√(s_t / (1 - βᵗ)) + ε)

One number for the whole leaf, so the geometry is SGD's: examples that matter little move little,
unlike under Adam, which equalises them. The mean runs over the rows that the minibatch visited.
γ is then in units of x: how far a typical entry moves when it is visited.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Rows, Table
from bilevel_flax.outer.optimisers.robust import mean_over_rows
from bilevel_flax.per_sample import RowTransformation


class NormalizedState(NamedTuple):
    """State of `normalized_sgd`."""

    count: jax.Array  # int32, steps taken
    mean_square: Any  # float32 scalar for each leaf of x


def normalized_sgd(
    learning_rate: optax.ScalarOrSchedule, *, decay: float = 0.999, eps: float = 1e-30
) -> RowTransformation:
    """Row-sparse SGD with each leaf's direction divided by its running root mean square.

    Args:
        learning_rate: γ, in units of x, or a schedule of the step count.
        decay: β of the running mean, in [0, 1).
        eps: ε, in units of the direction; guards against 0 / 0 only.

    Raises:
        ValueError: `decay` is outside [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> outer = normalized_sgd(0.1)
        >>> x = jnp.zeros(2)
        >>> update, _ = outer.update(jnp.array([1e-6, -1e-6]), outer.init(x), x)
        >>> [round(float(value), 3) for value in update]
        [-0.1, 0.1]
    """
    checks.learning_rate("learning_rate", learning_rate)
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must lie in [0, 1)")

    def init(params):
        squares = jax.tree.map(
            lambda _: jnp.zeros(()), params, is_leaf=lambda node: isinstance(node, Table)
        )
        return NormalizedState(jnp.zeros((), jnp.int32), squares)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("normalized_sgd needs params: update(updates, state, params)")
        square = functools.partial(mean_over_rows, size=jnp.square)
        now = jax.tree.map(square, updates, params, is_leaf=rows.is_rows)
        mean_square = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, state.mean_square, now
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)
        correction = 1 - decay ** count.astype(jnp.float32)

        def step(node, square):
            factor = -rate / (jnp.sqrt(square / correction) + eps)
            if rows.is_rows(node):
                return Rows(node.index, node.values * factor.astype(node.values.dtype))
            return node * factor.astype(node.dtype)

        steps = jax.tree.map(step, updates, mean_square, is_leaf=rows.is_rows)
        return steps, NormalizedState(count, mean_square)

    return RowTransformation(init, update)
