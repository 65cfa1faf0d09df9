"""Checks of what goes into an update and comes out: minibatches, ids, infos."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import Batch, Info


def check_finite(info: Info, step: Any = None) -> None:
    """Raises where an update met a direction or a loss that is not finite (`not info.ok`).

    It waits for the device: in a loop of your own call it every so often.

    Args:
        info: what `solver.update` returned.
        step: its number, for the message.

    Raises:
        FloatingPointError: names the directions and losses, and the likely causes.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.array(0.0), jnp.array(0.0))
        >>> _, info = solver.update(state, bf.Batch(jnp.nan, 1.0))
        >>> bf.check_finite(info, step=7)
        Traceback (most recent call last):
            ...
        FloatingPointError: step 7: ...
    """
    directions = ("inner (D_z)", "adjoint (D_v)", "outer (D_x)")
    lost = [side for side, fine in zip(directions, info.finite, strict=True) if not np.all(fine)]
    losses = [name for name in ("inner_loss", "outer_loss") if not _all_finite(getattr(info, name))]
    if not lost and not losses:
        return
    if losses:
        causes = (
            'NaN in the data, a label outside the classes, batch["index"] outside the n rows, '
            "batch.inner_id or outer_id outside the minibatches, or a domain that there is not"
        )
    elif not np.all(info.finite.inner):
        causes = (
            "batch.inner_id or outer_id outside the method's minibatches, a method whose full pass "
            "has not been made (solver.refresh, SRBA's), a loss without a finite derivative (sqrt "
            "or log at 0), or too long an inner step"
        )
    elif not np.all(info.finite.adjoint):
        causes = (
            "too long an adjoint step (above 2 over the inner loss's largest curvature), or "
            "batch.outer_id outside the method's minibatches"
        )
    else:
        causes = "too long an outer step"
    parts = [f"the direction of {', '.join(lost)}"] if lost else []
    parts += losses
    raise FloatingPointError(
        f"{'update' if step is None else f'step {step}'}: not finite: {' and '.join(parts)}; "
        f"{'the state stands still since; ' if lost else ''}likely {causes}"
    )


def _all_finite(values: Any) -> bool:
    return values is None or bool(np.all(np.isfinite(np.asarray(values, np.float64))))


def batch(value: Any, *, sides: tuple[str, ...] = ("inner", "outer")) -> None:
    """Raises unless `value` is a `Batch` with data on the sides that are needed.

    Raises:
        TypeError: a tuple, a dict, or anything else.
        ValueError: a side without data.
    """
    if not isinstance(value, Batch):
        raise TypeError(
            f"batch is a {type(value).__name__}, but must be "
            "bf.Batch(training_minibatch, validation_minibatch)"
        )
    for side in sides:
        if getattr(value, side) is None:
            raise ValueError(
                f"batch.{side} is None, but an update takes a minibatch of each side: "
                "bf.Batch(training_minibatch, validation_minibatch)"
            )


def require_ids(batch: Batch, name: str, needed: dict[str, bool], scalars: bool = False) -> None:
    """Raises where `needed[side]` and the side has data but no id, or an id is no integer.

    Args:
        batch: the minibatches.
        name: the method's.
        needed: whether the ids are read, by side.
        scalars: whether the method takes one minibatch of each side.

    Raises:
        TypeError: names the id that is no integer.
        ValueError: names the missing one, or the one that is no scalar.
    """
    for side, needs in needed.items():
        position = getattr(batch, f"{side}_id")
        if position is not None and not jnp.issubdtype(jnp.result_type(position), jnp.integer):
            raise TypeError(
                f"batch.{side}_id={position!r:.40} must be an integer, the minibatch's position in "
                f"the partition, got {jnp.result_type(position)}"
            )
        if position is not None and scalars and jnp.ndim(position):
            raise ValueError(
                f"batch.{side}_id has shape {jnp.shape(position)}, but must be a scalar: "
                f"{name or 'this solver'} takes one minibatch of each side"
            )
        if needs and position is None and getattr(batch, side) is not None:
            raise ValueError(
                f"batch.{side}_id is None, but {name or 'this solver'} needs the minibatch's "
                "position in the partition: Batch(inner, outer, inner_id=i, outer_id=j)"
            )
