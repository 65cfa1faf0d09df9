"""Parameters that stand still: no part of the linear system that v solves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Problem, PyTree
from bilevel_flax.base.condition import Condition
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.wrapped_loss import WrappedLoss
from bilevel_flax.oracles.linear_models import LinearLoss
from bilevel_flax.oracles.wrapped_loss import SIDES


@dataclasses.dataclass(frozen=True, eq=False)
class PartlyHeld(WrappedLoss):
    """A loss that sees some parameters as constants.

    Attributes:
        moves: `moves(z)`, a tree of z's with False for those.
    """

    moves: Callable[[PyTree], PyTree]


def moving_parameters(loss: Any, z: PyTree) -> PyTree:
    """A tree of booleans, False where a loss holds its parameters; None: it holds none."""
    while isinstance(loss, WrappedLoss):
        if isinstance(loss, PartlyHeld):
            return loss.moves(z)
        loss = loss.loss
    return None


def trainable(problem: Problem, mask: Any) -> Problem:
    """Holds all of z fixed but what a mask says: adapters (LoRA), a head, a filter of your own.

    Derivatives with respect to the rest are 0 and cost nothing, so that v stays 0 there. Needed
    where the library does not see z's optimiser (`bf.directions`, `inner=None`); elsewhere it reads
    from the optimiser which parameters never move. Where z can be the adapters alone, with the
    rest closed over or in the model state, v is that much smaller, too.

    Args:
        problem: the problem.
        mask: a pytree prefix of z with booleans, or a function of z that returns one (as for
            `optax.masked`); True: it moves.

    Raises:
        ValueError: at trace time, no prefix of z, or nothing is left to learn.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> loss = lambda z, x, batch: (x * (z["base"] + z["lora"]) - batch) ** 2
        >>> problem = bf.oracles.trainable(bf.Problem(loss, loss), {"base": False, "lora": True})
        >>> z = {"base": jnp.array(1.0), "lora": jnp.array(0.0)}
        >>> grad = bf.oracles.inner_grad(problem, z, jnp.array(1.0), 0.0)
        >>> float(grad["base"]), float(grad["lora"])
        (0.0, 2.0)
    """
    check_problem(problem)

    def moves(z: PyTree) -> PyTree:
        flags = mask(z) if callable(mask) else mask
        try:
            each = jax.tree.map(lambda flag, node: jax.tree.map(lambda _: flag, node), flags, z)
        except ValueError as error:
            raise ValueError(
                f"mask={flags!r:.80} is not a pytree prefix of inner_params "
                f"({jax.tree.structure(z)}): give booleans in the same nesting"
            ) from error
        if not any(jax.tree.leaves(each)):
            raise ValueError(f"mask={flags!r:.80} holds all of inner_params: nothing is learned")
        return each

    def held(z: PyTree) -> PyTree:
        return jax.tree.map(lambda flag, p: p if flag else jax.lax.stop_gradient(p), moves(z), z)

    def first_held(function):
        return lambda z, *args: function(held(z), *args)

    def condition_of_the_rest(condition):
        def call(z, x, batch, *context):
            out = condition(held(z), x, batch, *context)
            value, *aux = out if context else (out,)
            if jax.tree.structure(value) == jax.tree.structure(z):
                value = jax.tree.map(
                    lambda flag, c: c if flag else jnp.zeros_like(c), moves(z), value
                )
            return (value, *aux) if aux else value

        return call

    def wrapped(loss):
        if isinstance(loss, Condition):
            held_fixed = PartlyHeld(condition_of_the_rest(loss.loss), moves)
            return dataclasses.replace(loss, loss=held_fixed)
        if isinstance(loss, LinearLoss):
            return dataclasses.replace(
                loss,
                loss=PartlyHeld(first_held(loss.loss), moves),
                logits=first_held(loss.logits),
                penalty=None if loss.penalty is None else first_held(loss.penalty),
            )
        if isinstance(loss, WrappedLoss):
            return dataclasses.replace(loss, loss=wrapped(loss.loss))
        return PartlyHeld(first_held(loss), moves)

    return dataclasses.replace(problem, **{name: wrapped(getattr(problem, name)) for name in SIDES})
