"""Problems whose model is linear in its parameters: the losses as functions of the logits.

With logits = A(batch) z, A linear,

    G(z, x) = mean_i l_i(logits_i, x) + p(z, x)        F(z, x) = mean_j k_j(logits_j, x) + q(z, x)

the gradient of a minibatch is Aᵀ applied to its residuals dl/dlogits: one number for each example
and class instead of one for each parameter, which is all that `saba(memory="compact")` keeps. The
penalties p and q are the same for every minibatch and need no memory at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Problem, PyTree
from bilevel_flax.base.wrapped_loss import WrappedLoss
from bilevel_flax.minibatches import example_mask, masked_mean
from bilevel_flax.oracles.mixed_precision import LoweredLoss


@dataclasses.dataclass(frozen=True, eq=False)
class LinearLoss(WrappedLoss):
    """A loss of logits that are linear in z, taken apart.

    Attributes:
        logits: `logits(inner_params, batch) -> [batch, ...]`, linear (or affine) in the parameters.
        data: `data(logits, outer_params, batch) -> scalar`, the mean of the examples' losses.
        penalty: `penalty(inner_params, outer_params) -> scalar`; None: 0.
    """

    logits: Callable[[PyTree, PyTree], jax.Array]
    data: Callable[[jax.Array, PyTree, PyTree], jax.Array]
    penalty: Callable[[PyTree, PyTree], jax.Array] | None


def linear_loss(loss: Any) -> LinearLoss | None:
    """What is known about a loss of linear logits, whatever else is wrapped around it."""
    if isinstance(loss, LinearLoss):
        return loss
    if not isinstance(loss, WrappedLoss):
        return None
    model = linear_loss(loss.loss)
    if model is not None and isinstance(loss, LoweredLoss):
        return dataclasses.replace(model, logits=loss.lowered(model.logits))
    return model


def linear_problem(
    logits: Callable[[PyTree, PyTree], jax.Array],
    inner_losses: Callable[[jax.Array, PyTree, PyTree], jax.Array],
    outer_losses: Callable[[jax.Array, PyTree, PyTree], jax.Array],
    *,
    inner_penalty: Callable[[PyTree, PyTree], jax.Array] | None = None,
    outer_penalty: Callable[[PyTree, PyTree], jax.Array] | None = None,
    **settings: Any,
) -> Problem:
    """A `Problem` made of logits that are linear in z, losses of each example, and penalties.

    Every solver takes it; `saba(memory="compact")` needs it.

    Args:
        logits: `logits(inner_params, batch) -> [batch, ...]`, linear (or affine) in the parameters
            (the compact memory checks it).
        inner_losses: `inner_losses(logits, outer_params, batch) -> [batch]`, the loss of each
            example. Their mean, over the real ones (`minibatches.example_mask`), is G without its
            penalty. Per-sample leaves come as their rows, as in `Problem`.
        outer_losses: the same for F, without per-sample leaves.
        inner_penalty: `inner_penalty(inner_params, outer_params) -> scalar`, the part of G that is
            the same for every minibatch; without per-sample leaves.
        outer_penalty: the same for F.
        **settings: `per_sample` and `derivatives`, as in `Problem`.

    Raises:
        TypeError: a loss or penalty is no function; at trace time, losses that are not [batch].

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.linear_problem(
        ...     logits=lambda z, batch: batch["x"] @ z,
        ...     inner_losses=lambda logits, x, batch: jax.nn.softplus(-batch["y"] * logits),
        ...     outer_losses=lambda logits, x, batch: jax.nn.softplus(-batch["y"] * logits),
        ...     inner_penalty=lambda z, x: 0.5 * jnp.sum(jnp.exp(x) * z**2),
        ... )
        >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones(4)}
        >>> round(float(problem.inner_loss(jnp.zeros(3), jnp.zeros(3), batch)), 4)
        0.6931
    """
    functions = {"logits": logits, "inner_losses": inner_losses, "outer_losses": outer_losses}
    functions |= {"inner_penalty": inner_penalty, "outer_penalty": outer_penalty}
    for name, function in functions.items():
        if not (callable(function) or (function is None and name.endswith("penalty"))):
            raise TypeError(f"{name} must be a function, got {function!r}")

    def loss(name, losses, penalty):
        data = _mean_of(name, losses)
        return LinearLoss(_sum_of(logits, data, penalty), logits, data, penalty)

    return Problem(
        loss("inner_losses", inner_losses, inner_penalty),
        loss("outer_losses", outer_losses, outer_penalty),
        **settings,
    )


def _mean_of(name: str, losses: Callable) -> Callable:
    def mean(logits, x, batch):
        values = losses(logits, x, batch)
        if jnp.shape(values) != jnp.shape(logits)[:1]:
            raise TypeError(
                f"{name} must return one loss for each example, [{jnp.shape(logits)[0]}] for "
                f"logits {jnp.shape(logits)}, got shape {jnp.shape(values)}"
            )
        return masked_mean(values, example_mask(batch))

    return mean


def _sum_of(logits: Callable, data: Callable, penalty: Callable | None) -> Callable:
    def loss(z, x, batch):
        value = data(logits(z, batch), x, batch)
        return value if penalty is None else value + penalty(z, x)

    return loss
