"""Problems whose model is linear in its parameters: the losses as functions of the logits.

With logits = A(batch) z, A linear,

    G(z, x) = mean_i l_i(logits_i, x) + p(z, x)        F(z, x) = mean_j k_j(logits_j, x) + q(z, x)

the gradient of a minibatch is Aᵀ applied to its residuals dl/dlogits: one number for each example
and class instead of one for each parameter, which is all that `saba(memory="compact")` keeps. The
penalties p and q are the same for every minibatch and need no memory at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax.base import Problem, PyTree
from bilevel_flax.minibatches import example_mask, masked_mean


class LinearModel(NamedTuple):
    """The parts of a problem that is linear in its features.

    Attributes:
        logits: `logits(inner_params, batch) -> [batch, ...]`, linear (or affine) in the parameters.
        inner_data: `inner_data(logits, outer_params, batch) -> scalar`, the mean of l.
        outer_data: the same for k.
        inner_penalty: `inner_penalty(inner_params, outer_params) -> scalar`, p; None: 0.
        outer_penalty: q.
    """

    logits: Callable[[PyTree, PyTree], jax.Array]
    inner_data: Callable[[jax.Array, PyTree, PyTree], jax.Array]
    outer_data: Callable[[jax.Array, PyTree, PyTree], jax.Array]
    inner_penalty: Callable[[PyTree, PyTree], jax.Array] | None
    outer_penalty: Callable[[PyTree, PyTree], jax.Array] | None


def linear_problem(
    logits: Callable[[PyTree, PyTree], jax.Array],
    inner_losses: Callable[[jax.Array, PyTree, PyTree], jax.Array],
    outer_losses: Callable[[jax.Array, PyTree, PyTree], jax.Array],
    *,
    inner_penalty: Callable[[PyTree, PyTree], jax.Array] | None = None,
    outer_penalty: Callable[[PyTree, PyTree], jax.Array] | None = None,
    per_sample: PyTree = None,
    derivatives: str = "forward_over_reverse",
    microbatches: int = 1,
    compute_dtype: Any = None,
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
        per_sample: as in `Problem`.
        derivatives: as in `Problem`.
        microbatches: as in `Problem`; the compact memory does without.
        compute_dtype: as in `Problem`; the compact memory computes the logits in it.

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

    inner_data = _mean_of("inner_losses", inner_losses)
    outer_data = _mean_of("outer_losses", outer_losses)
    return Problem(
        _loss(logits, inner_data, inner_penalty),
        _loss(logits, outer_data, outer_penalty),
        per_sample=per_sample,
        derivatives=derivatives,
        microbatches=microbatches,
        compute_dtype=compute_dtype,
        linear=LinearModel(logits, inner_data, outer_data, inner_penalty, outer_penalty),
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


def _loss(logits: Callable, data: Callable, penalty: Callable | None) -> Callable:
    def loss(z, x, batch):
        value = data(logits(z, batch), x, batch)
        return value if penalty is None else value + penalty(z, x)

    return loss
