"""The Jacobian of ∇₁G beside ∇²₁₁G: the same, and symmetric, where ∇₁G is a gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.extend.core.primitives import copy_p, stop_gradient_p

from bilevel_flax.base import Problem
from bilevel_flax.oracles.derivatives import inner_grad
from bilevel_flax.tree import norm, split


@functools.partial(jax.jit, static_argnums=0)
def gradient_defects(problem: Problem, z, x, batch, model_state=None, rng=None):
    """How far ∇₁G is from being a gradient whose Jacobian is ∇²₁₁G; four products.

    Returns:
        `(asymmetry, stopped, tolerance)`, scalars; see `diagnostics.SymmetryCheck`.
    """
    floats = split(z)

    def field(leaves):
        grad = inner_grad(problem, floats.merge(leaves), x, batch, model_state, rng)
        return split(grad).leaves

    u, v = (
        optax.tree.random_like(jax.random.PRNGKey(seed), floats.leaves, jax.random.normal)
        for seed in (0, 1)
    )
    jaxpr = jax.make_jaxpr(field)(floats.leaves)
    moving = core.jaxpr_as_fun(_moving(jaxpr))
    eps = max(float(jnp.finfo(dtype).eps) for dtype in _dtypes(jaxpr.jaxpr))

    # Transposed products alone: every loss has them, also one without a forward mode.
    (image_u,), (image_v,) = (jax.vjp(field, floats.leaves)[1](w) for w in (u, v))
    true_v = jax.vjp(lambda leaves: moving(*leaves), floats.leaves)[1](v)[0]
    size = sum(leaf.size for leaf in floats.leaves)
    skew = jnp.abs(_dot(u, image_v) - _dot(v, image_u)) * jnp.sqrt(size)
    scale = norm(u) * norm(image_v) + norm(v) * norm(image_u)
    stopped = norm(jax.tree.map(jnp.subtract, true_v, image_v))
    return _share(skew, scale), _share(stopped, norm(true_v)), 3 * eps**0.5


def _dot(tree, other):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, other)))


def _share(part, whole):
    return jnp.where(part > 0, part / jnp.where(whole > 0, whole, part), 0.0)


def _moving(closed: Any) -> Any:
    """The function with every `stop_gradient` taken out, inside loops and branches too."""

    def rewrite(value):
        if isinstance(value, core.Jaxpr):  # since jax 0.12 a closed one is one of these, too
            return value.replace(eqns=[equation(eqn) for eqn in value.eqns])
        if isinstance(value, core.ClosedJaxpr):
            return core.ClosedJaxpr(rewrite(value.jaxpr), value.consts)
        if type(value) in (tuple, list):
            return type(value)(rewrite(item) for item in value)
        return value

    def equation(eqn):
        if eqn.primitive is stop_gradient_p:
            return eqn.replace(primitive=copy_p, params={})
        return eqn.replace(params={name: rewrite(value) for name, value in eqn.params.items()})

    return rewrite(closed)


def _dtypes(value: Any) -> set:
    """The floating-point types that a jaxpr computes in."""
    if type(value) in (tuple, list):
        return set().union(*map(_dtypes, value))
    if not isinstance(value, core.Jaxpr):
        return _dtypes(value.jaxpr) if isinstance(value, core.ClosedJaxpr) else set()
    variables = (*value.invars, *(variable for eqn in value.eqns for variable in eqn.outvars))
    dtypes = [getattr(variable.aval, "dtype", jnp.int32) for variable in variables]
    own = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
    return own.union(*(_dtypes(item) for eqn in value.eqns for item in eqn.params.values()))
