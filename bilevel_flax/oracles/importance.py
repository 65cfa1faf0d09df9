"""Minibatches of unequal sizes: each one's loss times N·w_i, w_i its share of the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Problem
from bilevel_flax.base.condition import Condition
from bilevel_flax.base.wrapped_loss import WrappedLoss
from bilevel_flax.oracles.linear_models import LinearLoss
from bilevel_flax.tree import is_inexact


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


def _times(loss: Any, factor: jax.Array, tree: bool = False) -> Callable[..., Any]:
    """The loss times a scalar; `tree`: what it returns first is one, as of a condition."""
    tree = tree or isinstance(loss, Condition)
    if isinstance(loss, LinearLoss):  # its penalty is no matter of minibatches
        return dataclasses.replace(
            loss, loss=_times(loss.loss, factor), data=_times(loss.data, factor)
        )
    if isinstance(loss, WrappedLoss):
        return dataclasses.replace(loss, loss=_times(loss.loss, factor, tree))

    def weighted(*args):
        return _first_times(loss(*args), factor)

    def condition(*args):
        out = loss(*args)
        value, *aux = out if len(args) > 3 else (out,)
        value = jax.tree.map(lambda leaf: _leaf_times(leaf, factor), value)
        return (value, *aux) if aux else value

    return condition if tree else weighted


def _first_times(out: Any, factor: jax.Array) -> Any:
    """What a loss returned with its value times a scalar: it stands first, in every form."""
    if isinstance(out, tuple):
        return (_first_times(out[0], factor), *out[1:])
    return _leaf_times(out, factor)


def _leaf_times(leaf: Any, factor: jax.Array) -> Any:
    return leaf * factor.astype(jnp.result_type(leaf)) if is_inexact(leaf) else leaf
