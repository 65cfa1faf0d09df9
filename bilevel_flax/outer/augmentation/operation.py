"""What a policy knows of an operation, its unit and range, and what is drawn to apply it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Operation(NamedTuple):
    """One way to change an example, by an amount; by 0 it changes nothing.

    Attributes:
        name: as users write it.
        unit: of its amounts.
        limit: the largest magnitude that a policy can learn, unless told otherwise, in `unit`.
        max_limit: the largest limit that makes sense.
        signed: amounts are drawn from [-magnitude, magnitude], else from [0, magnitude].
        graded: False: it is applied or not, its magnitude is 1 and is not learned.

    Example:
        >>> from bilevel_flax.outer import augmentation
        >>> rotate = augmentation.IMAGE_OPERATIONS["rotate"]
        >>> rotate.unit, rotate.signed, rotate.graded
        ('degrees', True, True)
    """

    name: str
    unit: str
    limit: float
    max_limit: float
    signed: bool = True
    graded: bool = True


def chosen(known: Mapping[str, Operation], names: Sequence[str]) -> tuple[Operation, ...]:
    """The operations called `names`, in the order in which they are applied.

    Raises:
        ValueError: none, an unknown name (the nearest is given), or one name twice.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"operations is empty: choose among {', '.join(known)}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"operations: {name!r} is unknown, choose among {', '.join(known)}{hint}"
            )
        if names.count(name) > 1:
            raise ValueError(f"operations: {name!r} occurs {names.count(name)} times, give it once")
    return tuple(operation for name, operation in known.items() if name in names)


def limits_of(
    operations: Sequence[Operation], limits: Mapping[str, float | None]
) -> tuple[float, ...]:
    """Each operation's largest magnitude, `limits` where it says so.

    Raises:
        ValueError: a limit of an operation that is not there or is not graded, or out of range.
    """
    graded = {operation.name: operation for operation in operations if operation.graded}
    for name, limit in limits.items():
        if limit is None:
            continue
        if name not in graded:
            raise ValueError(
                f"limits[{name!r}]={limit}: the policy has no such operation with a magnitude, "
                f"only {', '.join(graded) or 'none'}"
            )
        if not (math.isfinite(limit) and 0 < limit <= graded[name].max_limit):
            raise ValueError(
                f"limits[{name!r}]={limit} must lie in (0, {graded[name].max_limit:g}] "
                f"({graded[name].unit})"
            )
    given = {name: float(limit) for name, limit in limits.items() if limit is not None}
    return tuple(given.get(operation.name, operation.limit) for operation in operations)


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
