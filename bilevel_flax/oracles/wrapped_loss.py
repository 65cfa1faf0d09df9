"""How to wrap around losses that carry what is known about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from bilevel_flax.base import Problem
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.wrapped_loss import WrappedLoss

SIDES = ("inner_loss", "outer_loss")


def innermost(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function, under all that is wrapped around it here."""
    while isinstance(loss, WrappedLoss):
        loss = loss.loss
    return loss


def wrap_losses(
    problem: Problem,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    sides: Sequence[str] = SIDES,
) -> Problem:
    """The problem with a transformation of its losses, under what is known about them.

    Args:
        problem: the problem.
        transform: of a loss; the result takes and returns the same.
        sides: the losses in question.

    Raises:
        TypeError: a loss in the place of the problem.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> doubled = bf.oracles.wrap_losses(problem, lambda loss: lambda *args: 2 * loss(*args))
        >>> doubled.outer_loss(1.0, 0.0, 3.0)
        6.0
    """
    check_problem(problem)

    def wrapped(loss):
        if isinstance(loss, WrappedLoss):
            return dataclasses.replace(loss, loss=wrapped(loss.loss))
        return transform(loss)

    losses = {name: wrapped(getattr(problem, name)) for name in sides}
    return dataclasses.replace(problem, **losses)
