"""What is drawn for each example of a minibatch: how much of an operation, and whether at all."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Draws(NamedTuple):
    """The random part of a policy's application; x comes in afterwards.

    Attributes:
        amount: float32 [operations, batch] in (0, 1), uniform.
        applied: float32 [operations, batch] in (0, 1), uniform.
        key: of what operations draw themselves (noise, places).
    """

    amount: jax.Array
    applied: jax.Array
    key: jax.Array


def spread(key: jax.Array, rows: int, batch: int) -> jax.Array:
    """Uniform draws in (0, 1), [rows, batch], spread evenly over each row.

    A Latin hypercube: every entry is uniform, but of the `batch` equal parts of (0, 1) each holds
    exactly one entry of a row. The mean over a minibatch then varies less than with independent
    draws, and with it D_x.

    References:
        M. D. McKay, R. J. Beckman, W. J. Conover. A comparison of three methods for selecting
        values of input variables in the analysis of output from a computer code. Technometrics
        1979.
    """
    order, within = jax.random.uniform(key, (2, rows, batch))
    place = jnp.argsort(order, axis=1).astype(within.dtype)
    return (place + jnp.clip(within, 1e-4, 1 - 1e-4)) / batch


def draw(key: jax.Array, operations: int, batch: int) -> Draws:
    """All that one minibatch needs."""
    spread_key, own_key = jax.random.split(key)
    both = spread(spread_key, 2 * operations, batch)
    return Draws(both[:operations], both[operations:], own_key)
