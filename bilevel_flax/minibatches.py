"""Ragged minibatches: means over real examples, losses times N·w_i, w_i a minibatch's share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import Problem, PyTree
from bilevel_flax.tree import is_inexact


def share_factors(name: str, weights: Any) -> jax.Array | None:
    """N·w_i for each minibatch, or None for equal ones.

    Raises:
        ValueError: `weights` are no shares that sum to 1.
    """
    if weights is None:
        return None
    values = np.asarray(weights, np.float64)
    if values.ndim != 1 or not len(values) or not (values > 0).all():
        raise ValueError(
            f"{name} must be a vector of positive shares, one for each minibatch, "
            f"got shape {values.shape}: pass FiniteSum.weights"
        )
    if abs(values.sum() - 1) > 1e-4:
        raise ValueError(f"{name} must sum to 1 (shares of the samples), got {values.sum():.6g}")
    return jnp.asarray(values * len(values))


def times(loss: Callable[..., Any], factor: jax.Array) -> Callable[..., Any]:
    """The loss times a scalar: cheaper than scaling each of its derivatives."""

    def scaled_loss(*args):
        out = loss(*args)
        if isinstance(out, tuple):
            return (out[0] * factor.astype(jnp.result_type(out[0])), *out[1:])
        return out * factor.astype(jnp.result_type(out))

    return scaled_loss


def scaled_problem(problem: Problem, factor: jax.Array, side: str) -> Problem:
    """The problem with its `side` loss ("inner", "outer") times a scalar."""
    linear = problem.linear
    if linear is not None:  # the penalties are no matter of minibatches
        linear = linear._replace(**{f"{side}_data": times(getattr(linear, f"{side}_data"), factor)})
    loss = times(getattr(problem, f"{side}_loss"), factor)
    return dataclasses.replace(problem, **{f"{side}_loss": loss}, linear=linear)


def scaled(tree: PyTree, factor: Any) -> PyTree:
    """The float leaves times a scalar, in their own dtypes; None: as they are."""
    if factor is None:
        return tree

    def times(leaf):
        return leaf * jnp.asarray(factor, leaf.dtype) if is_inexact(leaf) else leaf

    return jax.tree.map(times, tree)


def masked_mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean over the real examples of a minibatch.

    Args:
        values: [batch], one value for each example (already weighted, where there are weights).
        mask: [batch], 1 for real examples and 0 for padding (`batch.get("mask")`); None: all real.

    Returns:
        Scalar; a padded example contributes nothing, even when its value is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    if mask is None:
        return jnp.mean(values)
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {mask.shape}, values {values.shape}: give one value an example"
        )
    total = jnp.sum(jnp.where(mask > 0, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)
