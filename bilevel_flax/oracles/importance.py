"""Minibatches of unequal sizes: each one's loss times N·w_i, w_i its share of the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Problem
from bilevel_flax.oracles.linear_models import LinearLoss
from bilevel_flax.oracles.wrapped_loss import WrappedLoss


def importance_weighted(problem: Problem, factor: jax.Array | None, side: str) -> Problem:
    """The problem with one loss times a scalar: cheaper than scaling each of its derivatives.

    Args:
        problem: the problem.
        factor: N·w_i; None: as it is.
        side: "inner_loss" or "outer_loss".
    """
    if factor is None:
        return problem
    return dataclasses.replace(problem, **{side: _times(getattr(problem, side), factor)})


def _times(loss: Any, factor: jax.Array) -> Callable[..., Any]:
    if isinstance(loss, LinearLoss):  # its penalty is no matter of minibatches
        return dataclasses.replace(
            loss, loss=_times(loss.loss, factor), data=_times(loss.data, factor)
        )
    if isinstance(loss, WrappedLoss):
        return dataclasses.replace(loss, loss=_times(loss.loss, factor))

    def weighted(*args):
        return _first_times(loss(*args), factor)

    return weighted


def _first_times(out: Any, factor: jax.Array) -> Any:
    """What a loss returned with its value times a scalar: it stands first, in every form."""
    if isinstance(out, tuple):
        return (_first_times(out[0], factor), *out[1:])
    return out * factor.astype(jnp.result_type(out))
