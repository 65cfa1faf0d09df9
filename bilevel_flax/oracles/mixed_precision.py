"""Losses that compute in a coarser dtype than the parameters are kept in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Problem
from bilevel_flax.base.condition import Condition
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.wrapped_loss import WrappedLoss
from bilevel_flax.minibatches import MASKS, name_of
from bilevel_flax.oracles.microbatches import Microbatched
from bilevel_flax.oracles.weighted_sums import weighted_sum
from bilevel_flax.oracles.wrapped_loss import SIDES
from bilevel_flax.tree import depends_on

COMPUTE_DTYPES = ("bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True, eq=False)
class LoweredLoss(WrappedLoss):
    """A loss that is handed z and the minibatch's floats rounded to a dtype.

    Attributes:
        dtype: the dtype.
    """

    dtype: Any

    def __call__(self, z: Any, x: Any, batch: Any, *context: Any) -> Any:
        """The loss, in float32 at least, and the model state in the dtypes that it came in."""
        lowered = cast_to_compute(batch, self.dtype)
        if pair := weighted_sum(self.loss):  # what is counted stays whole
            counted = depends_on(lambda batch: pair.weight(z, x, batch, *context), batch)
            leaves = zip(jax.tree.leaves(batch), jax.tree.leaves(lowered), counted, strict=True)
            leaves = [leaf if kept else cast for leaf, cast, kept in leaves]
            lowered = jax.tree.unflatten(jax.tree.structure(batch), leaves)
        out = self.loss(cast_to_compute(z, self.dtype), x, lowered, *context)
        if not context:
            return _widened(out)
        value, aux = out
        return _widened(value), aux._replace(model_state=_like(aux.model_state, context[0]))

    def lowered(self, logits: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
        """`logits(z, batch)` computed in the same way."""
        cast = lambda tree: cast_to_compute(tree, self.dtype)
        return lambda z, batch: _widened(logits(cast(z), cast(batch)))


class LoweredCondition(LoweredLoss):
    """The same for a condition, whose output is a tree like z."""

    def __call__(self, z: Any, x: Any, batch: Any, *context: Any) -> Any:
        """The condition in z's dtypes."""
        out = self.loss(
            cast_to_compute(z, self.dtype), x, cast_to_compute(batch, self.dtype), *context
        )
        if not context:
            return _like(out, z)
        value, aux = out
        return _like(value, z), aux._replace(model_state=_like(aux.model_state, context[0]))


def is_lowered(loss: Any) -> bool:
    """Whether anything in a loss computes in a dtype of its own."""
    if not isinstance(loss, WrappedLoss):
        return False
    return isinstance(loss, LoweredLoss) or is_lowered(loss.loss)


def mixed_precision(problem: Problem, compute_dtype: Any) -> Problem:
    """Hands the losses z and the minibatch's floats rounded to a dtype, inside what is derived.

    x and the masks of examples stay as they are; z, v, all gradients, products and optimisers keep
    their own dtypes (float32 masters). Products are then within about 1 % of those in float32. Best
    with losses that go on from `logits.astype(jnp.float32)`.

    Args:
        problem: the problem.
        compute_dtype: "bfloat16", "float32" or "float64" (float16 overflows without loss scaling).

    Raises:
        ValueError: another dtype, or bfloat16 with finite differences.

    Example:
        >>> import bilevel_flax as bf
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean()
        >>> problem = bf.oracles.mixed_precision(bf.Problem(loss, loss), "bfloat16")
    """
    check_problem(problem)
    _check_dtype(compute_dtype, problem.derivatives)

    def lower(loss):
        if isinstance(loss, Microbatched):  # seen as such from outside
            return dataclasses.replace(loss, loss=lower(loss.loss))
        if isinstance(loss, Condition):
            return dataclasses.replace(loss, loss=LoweredCondition(loss.loss, compute_dtype))
        return LoweredLoss(loss, compute_dtype)

    return dataclasses.replace(problem, **{name: lower(getattr(problem, name)) for name in SIDES})


def cast_to_compute(tree: Any, dtype: Any) -> Any:
    """The tree with its floats in `dtype`; masks of examples stay, for they are summed."""

    def cast(path, leaf):
        if name_of(path[-1:]) in MASKS or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        return jnp.asarray(leaf, dtype)

    return jax.tree_util.tree_map_with_path(cast, tree)


def _widened(value: Any) -> Any:
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _like(after: Any, before: Any) -> Any:
    """A new tree in the dtypes of an old one; another structure is left to the checks."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        return after
    return jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, before)


def _check_dtype(dtype: Any, derivatives: str) -> None:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype={dtype!r} is not among {COMPUTE_DTYPES} (float16 overflows without "
            "loss scaling); None computes in the parameters' own"
        )
    if name == "bfloat16" and derivatives == "finite_differences":
        raise ValueError(
            f'compute_dtype={dtype!r} has 8 bits, too few for derivatives="finite_differences": '
            "take another of the two"
        )
