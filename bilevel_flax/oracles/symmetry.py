"""The Jacobian of ∇₁G beside ∇²₁₁G: the same, and symmetric, where ∇₁G is a gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core.primitives import copy_p, stop_gradient_p

from bilevel_flax.base import Problem
from bilevel_flax.oracles.gradients import (
    inner_grad,
)
from bilevel_flax.oracles.jaxprs import coarsest, rewritten
from bilevel_flax.oracles.trainable import moving_parameters
from bilevel_flax.tree import is_inexact, norm, split


@functools.partial(jax.jit, static_argnums=0)
def gradient_defects(problem: Problem, z, x, batch, model_state=None, rng=None):
    """How far ∇₁G is from being a gradient whose Jacobian is ∇²₁₁G; four products.

    Returns:
        `(asymmetry, stopped, tolerance)`, scalars; see `diagnostics.SymmetryCheck`.
    """
    floats = split(z)
    # What is held by intent (`oracles.trainable`) is a constant here, and no part of the system.
    flags = moving_parameters(problem.inner_loss, z)
    pairs = [] if flags is None else zip(jax.tree.leaves(flags), jax.tree.leaves(z), strict=True)
    held = [not flag for flag, leaf in pairs if is_inexact(leaf)] or [False] * len(floats.leaves)
    constants = floats.leaves

    def field(leaves):
        leaves = [c if h else p for c, h, p in zip(constants, held, leaves, strict=True)]
        grad = inner_grad(problem, floats.merge(leaves), x, batch, model_state, rng)
        return split(grad).leaves

    u, v = _two_normals(floats.leaves)
    jaxpr = jax.make_jaxpr(field)(floats.leaves)
    moving = core.jaxpr_as_fun(_moving(jaxpr))

    # Transposed products alone: every loss has them, also one without a forward mode.
    (image_u,), (image_v,) = (jax.vjp(field, floats.leaves)[1](w) for w in (u, v))
    try:
        true_v = jax.vjp(lambda leaves: moving(*leaves), floats.leaves)[1](v)[0]
    except (ValueError, NotImplementedError):  # stopped because it must be: a callback, a kernel
        true_v = image_v
    size = sum(leaf.size for leaf in floats.leaves)
    skew = jnp.abs(_dot(u, image_v) - _dot(v, image_u)) * jnp.sqrt(size)
    scale = norm(u) * norm(image_v) + norm(v) * norm(image_u)
    stopped = norm(jax.tree.map(jnp.subtract, true_v, image_v))
    return _share(skew, scale), _share(stopped, norm(true_v)), 3 * coarsest(jaxpr) ** 0.5


def _two_normals(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Two random trees, as one draw that is cut up: XLA compiles each generator on its own."""
    ends = np.cumsum([leaf.size for leaf in leaves])
    drawn = jax.random.normal(jax.random.PRNGKey(0), (2, ends[-1]))

    def like(flat):
        parts = zip(jnp.split(flat, ends[:-1]), leaves, strict=True)
        return [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in parts]

    return like(drawn[0]), like(drawn[1])


def _dot(tree, other):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, other)))


def _share(part, whole):
    return jnp.where(part > 0, part / jnp.where(whole > 0, whole, part), 0.0)


def _moving(closed: Any) -> Any:
    """The function with every `stop_gradient` taken out, inside loops and branches too."""
    return rewritten(
        closed,
        lambda eqn: (
            eqn.replace(primitive=copy_p, params={}) if eqn.primitive is stop_gradient_p else eqn
        ),
    )
