"""Gradients of G and of F one by one, so that no method pays for one that it does not use.

A `Microbatched` loss has each of them summed over parts of the minibatch.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from bilevel_flax.base import Problem, PyTree
from bilevel_flax.base.condition import is_condition
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.microbatches import in_parts, whole
from bilevel_flax.oracles.stops import explained, first_refusal
from bilevel_flax.tree import split


def inner_value_and_grad(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁G)` (1 unit).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> (loss, aux), gradient = bf.oracles.inner_value_and_grad(problem, z, x, 1.0)
        >>> float(loss), float(gradient)
        (4.5, -3.0)
    """
    if in_parts(problem.inner_loss):
        part = lambda problem, *args: inner_value_and_grad(problem, z, x, *args)
        return whole(part, problem, "inner_loss", (z, x), batch, model_state, rng)
    loss, z_split, x_split, _ = losses.inner(problem, z, x, batch, model_state, rng)
    leaves = z_split.leaves, x_split.leaves
    with explained("inner_loss", loss, *leaves):
        out, grad = jax.value_and_grad(loss, has_aux=True)(*leaves)
    return out, z_split.complete(grad)


def inner_grad(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₁G (1 unit).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> float(bf.oracles.inner_grad(problem, z, x, 1.0))
        -3.0
    """
    return inner_value_and_grad(problem, z, x, batch, model_state, rng)[1]


def inner_value_and_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁G, ∇₂G)` from one backprop (1 unit); per-sample leaves of ∇₂G are `Rows`.

    Raises:
        ValueError: the inner problem is a condition, which is the gradient of nothing.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> (loss, aux), *gradients = bf.oracles.inner_value_and_grads(problem, z, x, 1.0)
        >>> [float(gradient) for gradient in gradients]
        [-3.0, 3.0]
    """
    if is_condition(problem.inner_loss):
        raise ValueError(
            "a condition has no value, so there is no gradient of it in outer_params: take a "
            "method with an adjoint, e.g. soba, auto or implicit"
        )
    if in_parts(problem.inner_loss):
        part = lambda problem, *args: inner_value_and_grads(problem, z, x, *args)
        return whole(part, problem, "inner_loss", (z, x), batch, model_state, rng)
    loss, z_split, x_split, as_outer = losses.inner(problem, z, x, batch, model_state, rng)
    leaves = z_split.leaves, x_split.leaves
    with explained("inner_loss", loss, *leaves):
        out, (grad_z, grad_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(*leaves)
    return out, z_split.complete(grad_z), as_outer(grad_x)


def inner_grad_outer(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₂G, the inner loss's direct gradient in x (1 unit); per-sample leaves are `Rows`.

    Raises:
        ValueError: as `inner_value_and_grads`.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> float(bf.oracles.inner_grad_outer(problem, z, x, 1.0))
        3.0
    """
    return inner_value_and_grads(problem, z, x, batch, model_state, rng)[2]


def outer_value_and_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁F, ∇₂F)` from one backprop (1 unit); per-sample leaves of ∇₂F are None.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> (loss, aux), *gradients = bf.oracles.outer_value_and_grads(problem, z, x, 1.0)
        >>> float(loss), [float(gradient) for gradient in gradients]
        (0.0, [1.0, 0.0])
    """
    if in_parts(problem.outer_loss):
        part = lambda problem, *args: outer_value_and_grads(problem, z, x, *args)
        return whole(part, problem, "outer_loss", (z, x), batch, model_state, rng)
    loss, z_split, x_split = losses.outer(problem, z, x, batch, model_state, rng)
    leaves = z_split.leaves, x_split.leaves
    with explained("outer_loss", loss, *leaves):
        out, (grad_z, grad_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(*leaves)
    return out, z_split.complete(grad_z), x_split.complete(grad_x)


def outer_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`(∇₁F, ∇₂F)` from one backprop (1 unit).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> [float(gradient) for gradient in bf.oracles.outer_grads(problem, z, x, 1.0)]
        [1.0, 0.0]
    """
    return outer_value_and_grads(problem, z, x, batch, model_state, rng)[1:]


def unrolled_value_and_grad(problem: Problem, unroll: Callable, x, batch, rng=None):
    """d/dx F(z_K(x), x) by backprop through an inner loop, the loop's start held fixed.

    Args:
        problem: the problem.
        unroll: `unroll(x) -> (z_K, model_state, extra)`, differentiable in x's float leaves, with
            the mutable state that a stateful outer loss is to be handed.
        x: the outer parameters.
        batch: an outer minibatch.
        rng: key of a stateful outer loss.

    Returns:
        `((loss, aux), gradient, (z_K, extra))`; the gradient is dense, in x's tree. K inner
        gradients, K HVPs, K cross-JVPs and one gradient of F: 3K + 1 units.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> def unroll(x):  # two steps of gradient descent
        ...     grad = lambda z: bf.oracles.differentiable_inner_grad(problem, z, x, 1.0)[1]
        ...     step = lambda z: z - 0.5 * grad(z)
        ...     return step(step(z)), None, None
        >>> float(bf.oracles.unrolled_value_and_grad(problem, unroll, x, 1.0)[1])
        0.75
    """
    x_split = split(x)

    def total(leaves):
        x = x_split.merge(leaves)
        z, model_state, extra = unroll(x)

        def value(problem, batch, model_state, rng):
            loss, z_split, x_seen = losses.outer(problem, z, x, batch, model_state, rng)
            return (loss(z_split.leaves, x_seen.leaves),)

        # Backprop through a sum of parts would keep the activations of them all.
        part = value
        if in_parts(problem.outer_loss):
            part = lambda problem, *args: jax.checkpoint(lambda *rest: value(problem, *rest))(*args)
        ((loss, aux),) = whole(part, problem, "outer_loss", (z, x), batch, model_state, rng)
        return loss, (aux, (z, extra))

    def refusal(leaves):
        x = x_split.merge(leaves)
        z, model_state, _ = unroll(x)
        loss, z_split, x_seen = losses.outer(problem, z, x, batch, model_state, rng)
        refused.append(first_refusal("outer_loss", loss, z_split.leaves, x_seen.leaves))

    refused: list[str] = []
    try:
        (value, (aux, results)), grad = jax.value_and_grad(total, has_aux=True)(x_split.leaves)
    except (TypeError, ValueError, NotImplementedError) as error:
        jax.eval_shape(refusal, x_split.leaves)
        if any(refused):
            raise TypeError(refused[0]) from error
        raise
    return (value, aux), x_split.complete(grad), results
