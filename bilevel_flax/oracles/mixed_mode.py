"""∇₁G for methods that differentiate through it: backprop through it is `jvp(grad)`.

Backprop through z ← z - ρ ∇₁G(z, x) meets, for a cotangent c of ∇₁G, the products

    (∂∇₁G/∂z)ᵀ c = ∇²₁₁G c        (∂∇₁G/∂x)ᵀ c = ∇²₂₁G c

since ∇²₁₁G is symmetric. Left alone, JAX transposes the backprop inside of ∇₁G, and keeps what that
backprop computed on the way; taken as `jvp(grad)` they need the tangent beside the primal, one
layer at a time where layers are rematerialised.

References:
    I. Kemaev, D. Calian, L. M. Zintgraf, G. Farquhar, H. van Hasselt. Scalable meta-learning via
    mixed-mode differentiation. ICML 2025.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Problem, PyTree, Variables
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.derivatives import (
    inner_products,
)
from bilevel_flax.oracles.gradients import (
    inner_value_and_grad,
)
from bilevel_flax.oracles.microbatches import in_parts, whole
from bilevel_flax.tree import add, filter_inexact, is_inexact, split


def differentiable_inner_grad(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁G)`, differentiable in z and x by `Problem.derivatives`.

    The same numbers as `inner_value_and_grad`, and for a symmetric ∇²₁₁G the same derivatives. A
    loss whose gradient is none (`diagnostics.check_symmetry`) needs "reverse_over_reverse", which
    transposes the Jacobian as it is.

    Args:
        problem: the problem.
        z: the inner parameters.
        x: the outer parameters.
        batch: an inner minibatch.
        model_state: mutable state, handed to a stateful loss.
        rng: its key.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> import jax
        >>> after = lambda x: z - 0.1 * bf.oracles.differentiable_inner_grad(problem, z, x, 1.0)[1]
        >>> round(float(jax.grad(after)(x)), 3)  # of one step of gradient descent
        0.1
    """
    if in_parts(problem.inner_loss):
        part = lambda problem, *args: differentiable_inner_grad(problem, z, x, *args)
        return whole(part, problem, "inner_loss", (z, x), batch, model_state, rng)
    # Rows are gathered outside, so that a cotangent is as large as the minibatch.
    x = rows.gather(problem.per_sample, x, batch)
    whole_rows = dataclasses.replace(problem, per_sample=None)

    @jax.custom_vjp
    def gradient(z, x, context):
        return inner_value_and_grad(whole_rows, z, x, *context)

    def forward(*primals):
        z, x, context = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)
        return gradient(z, x, context), (z, x, context)

    def backward(kept, cotangents):
        z, x, context = kept
        out, along = cotangents
        v = split(z).complete(_floats(along))
        _, _, *products = inner_products(whole_rows, Variables(z, v, x), *context)
        if any(_is_float(leaf) and type(leaf) is not SymbolicZero for leaf in jax.tree.leaves(out)):
            beside = _of_value(whole_rows, z, x, context, out)
            products = [add(*pair) for pair in zip(products, beside, strict=True)]
        return *map(filter_inexact, products), None

    gradient.defvjp(forward, backward, symbolic_zeros=True)
    return gradient(z, x, (batch, model_state, rng))


def _of_value(problem: Problem, z: PyTree, x: PyTree, context: tuple, cotangents: PyTree) -> Any:
    """What G itself and its aux pull back to z and x: optimisers may use the loss, F the state."""
    loss, z_split, x_split, _ = losses.inner(problem, z, x, *context)
    floats = lambda z, x: [leaf for leaf in jax.tree.leaves(loss(z, x)) if is_inexact(leaf)]
    back_z, back_x = jax.vjp(floats, z_split.leaves, x_split.leaves)[1](_floats(cotangents))
    return z_split.complete(back_z), x_split.complete(back_x)


def _is_primal(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _floats(cotangents: PyTree) -> list:
    """The cotangents of floats as arrays."""
    leaves = [leaf for leaf in jax.tree.leaves(cotangents) if _is_float(leaf)]
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    return [zeros(leaf) if type(leaf) is SymbolicZero else leaf for leaf in leaves]
