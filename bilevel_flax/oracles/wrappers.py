"""Abilities of a problem that its losses do not have by themselves: `Problem -> Problem`.

    problem = bf.oracles.microbatched(bf.oracles.mixed_precision(problem, "bfloat16"), 4)

They can be combined in any order; what a loss computes stays the same (up to rounding).
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax

from bilevel_flax.base import Problem
from bilevel_flax.oracles.microbatches import Microbatched
from bilevel_flax.oracles.mixed_precision import mixed_precision
from bilevel_flax.oracles.wrapped_loss import SIDES, innermost, wrap_losses


def configured(problem: Problem, settings: Mapping[str, Any]) -> Problem:
    """The problem as a config's `problem` asks for it.

    Args:
        problem: as a task made it.
        settings: any of `remat`, `microbatches`, `compute_dtype` and `derivatives`.

    Raises:
        ValueError: as the wrappers, and `Problem`.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> problem = bf.oracles.configured(problem, {"derivatives": "reverse_over_reverse"})
        >>> problem.derivatives
        'reverse_over_reverse'
    """
    if "derivatives" in settings:
        problem = dataclasses.replace(problem, derivatives=settings["derivatives"])
    if settings.get("compute_dtype") is not None:
        problem = mixed_precision(problem, settings["compute_dtype"])
    if settings.get("remat"):
        problem = remat(problem)
    return microbatched(problem, settings.get("microbatches", 1))


def remat(problem: Problem) -> Problem:
    """Recomputes the inner loss's forward pass in the backward one (`jax.checkpoint`).

    Less memory for activations, about 1.2 times the FLOPs. Blocks of the network that are
    rematerialised one by one (`flax.linen.remat`) save more.

    Example:
        >>> import bilevel_flax as bf
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean()
        >>> problem = bf.oracles.remat(bf.Problem(loss, loss))
    """
    return wrap_losses(problem, jax.checkpoint, ("inner_loss",))


def microbatched(problem: Problem, parts: int) -> Problem:
    """The oracles summed over equal parts of every minibatch, one after the other.

    The same numbers with the activations of one part. A stateful loss is called once a part, each
    with a key of its own and the model state after the part before, so BatchNorm normalises by the
    statistics of a part.

    Args:
        problem: losses that are means over the examples, weighted by `batch["mask"]`, or
            `weighted_sums`.
        parts: k >= 1, which divides the leading lengths of the minibatches.

    Raises:
        ValueError: `parts` is no integer >= 1; at trace time, it does not divide a minibatch, or a
            loss is a sum, or a mean over something else than examples.

    Example:
        >>> import bilevel_flax as bf
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean()
        >>> problem = bf.oracles.microbatched(bf.Problem(loss, loss), 4)
    """
    if not isinstance(parts, numbers.Integral) or isinstance(parts, bool) or parts < 1:
        raise ValueError(f"microbatches={parts!r} must be an integer >= 1")
    if parts == 1:
        return problem
    checked = wrap_losses(problem, lambda loss: loss)
    for name in SIDES:
        if not getattr(innermost(getattr(checked, name)), "is_mean", True):
            raise ValueError(
                f"microbatches={parts}: {name} has floors or a temperature (bf.outer.goals), so "
                "that it is no mean over parts of a minibatch: leave one of them out"
            )
    return dataclasses.replace(
        problem, **{name: Microbatched(getattr(checked, name), int(parts)) for name in SIDES}
    )
