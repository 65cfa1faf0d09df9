"""The quantities one by one, so that no method pays for one that it does not use."""

from __future__ import annotations

from collections.abc import Callable

import jax

from bilevel_flax.base import Problem, PyTree, Variables
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.microbatches import accumulated
from bilevel_flax.oracles.products import PRODUCTS, check_adjoint
from bilevel_flax.tree import is_inexact, split


def inner_products(problem: Problem, variables: Variables, batch, model_state=None, rng=None):
    """∇₁G, ∇²₁₁G v and ∇²₂₁G v from one differentiated backprop (3 units).

    Args:
        problem: the problem.
        variables: the point (z, v, x).
        batch: an inner minibatch.
        model_state: mutable state, handed to a stateful loss.
        rng: its key; one draw serves the primal and the tangent.

    Returns:
        `((loss, aux), inner_grad, hvp, cross_jvp)`.
    """
    z, v, x = variables
    check_adjoint(z, v)

    def on(batch, model_state, rng):
        loss, z_split, x_split, as_outer = losses.inner(problem, z, x, batch, model_state, rng)
        out, grad_z, (hvp, cross) = PRODUCTS[problem.derivatives](
            loss, z_split.leaves, x_split.leaves, split(v).leaves
        )
        return out, z_split.complete(grad_z), z_split.complete(hvp), as_outer(cross)

    return accumulated(problem, on, batch, model_state, rng)


def inner_value_and_grad(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁G)` (1 unit)."""

    def on(batch, model_state, rng):
        loss, z_split, x_split, _ = losses.inner(problem, z, x, batch, model_state, rng)
        out, grad = jax.value_and_grad(loss, has_aux=True)(z_split.leaves, x_split.leaves)
        return out, z_split.complete(grad)

    return accumulated(problem, on, batch, model_state, rng)


def inner_grad(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₁G (1 unit)."""
    return inner_value_and_grad(problem, z, x, batch, model_state, rng)[1]


def inner_grad_outer(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₂G, the inner loss's direct gradient in x (1 unit); per-sample leaves are `Rows`."""

    def on(batch, model_state, rng):
        loss, z_split, x_split, as_outer = losses.inner(problem, z, x, batch, model_state, rng)
        out, grad = jax.value_and_grad(loss, argnums=1, has_aux=True)(
            z_split.leaves, x_split.leaves
        )
        return out, as_outer(grad)

    return accumulated(problem, on, batch, model_state, rng)[1]


def hvp(problem: Problem, variables: Variables, batch, model_state=None, rng=None) -> PyTree:
    """∇²₁₁G v (1 unit by the papers' count)."""
    return inner_products(problem, variables, batch, model_state, rng)[2]


def cross_jvp(problem: Problem, variables: Variables, batch, model_state=None, rng=None) -> PyTree:
    """∇²₂₁G v (1 unit by the papers' count); per-sample leaves are `Rows`."""
    return inner_products(problem, variables, batch, model_state, rng)[3]


def outer_value_and_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁F, ∇₂F)` from one backprop (1 unit); per-sample leaves of ∇₂F are None."""

    def on(batch, model_state, rng):
        loss, z_split, x_split = losses.outer(problem, z, x, batch, model_state, rng)
        out, (grad_z, grad_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            z_split.leaves, x_split.leaves
        )
        return out, z_split.complete(grad_z), x_split.complete(grad_x)

    return accumulated(problem, on, batch, model_state, rng, problem.outer_updates_state)


def outer_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`(∇₁F, ∇₂F)` from one backprop (1 unit)."""
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
    """
    x_split = split(x)

    def total(leaves):
        now = x_split.merge(leaves)
        z, model_state, extra = unroll(now)

        def on(batch, model_state, rng):
            loss, z_split, seen = losses.outer(problem, z, now, batch, model_state, rng)
            return (loss(z_split.leaves, seen.leaves),)

        # Backprop through a sum of parts would keep the activations of them all.
        part = on if problem.microbatches == 1 else jax.checkpoint(on)
        threaded = problem.outer_updates_state
        ((value, aux),) = accumulated(problem, part, batch, model_state, rng, threaded)
        return value, (aux, (z, extra))

    (value, (aux, found)), grad = jax.value_and_grad(total, has_aux=True)(x_split.leaves)
    return (value, aux), x_split.complete(grad), found


def directional(function: Callable, primals: tuple, tangents: tuple) -> PyTree:
    """The derivative of any function of pytrees in one direction, over the float leaves.

    Args:
        function: `function(*primals) -> tree`.
        primals: where; other leaves than floats are constants.
        tangents: the direction; leaves opposite other leaves than floats are not read, and may be
            None.

    Returns:
        The derivative of the result, with None for leaves that are no floats.
    """
    floats_of = split(primals)
    kept = [leaf for leaf in jax.tree.leaves(tangents) if is_inexact(leaf)]

    def floats(leaves):
        result = jax.tree.leaves(function(*floats_of.merge(leaves)))
        return [leaf for leaf in result if is_inexact(leaf)]

    _, moved = jax.jvp(floats, (floats_of.leaves,), (kept,))
    shapes = jax.eval_shape(lambda: function(*primals))
    leaves, treedef = jax.tree.flatten(shapes)
    found = iter(moved)
    return treedef.unflatten([next(found) if is_inexact(leaf) else None for leaf in leaves])
