"""The oracles from first derivatives alone: the penalty method's second network in v's place.

With y the tracked minimiser of G + F/λ beside z, the one of G, and v = λ(y - z),

    λ(∇₁G(y, x) - ∇₁G(z, x)) ≈ ∇²₁₁G v      λ(∇₂G(y, x) - ∇₂G(z, x)) ≈ ∇²₂₁G v      ∇F(y, x)

D_v is then λ times the gradient of G + F/λ at y (less that of G at z, which is 0 in the end), and
D_x that of the penalised problem min_x F(y, x) + λ(G(y, x) - G(z, x)). The bias of D_x is O(1/λ).
Both gradients of G are taken on one minibatch with one rng key, so that their noise does not grow
with λ.

References:
    J. Kwon, D. Kwon, S. Wright, R. D. Nowak. A fully first-order method for stochastic bilevel
    optimization. ICML 2023.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Rows, Variables
from bilevel_flax.oracles.derivatives import (
    check_adjoint,
)
from bilevel_flax.oracles.evaluate import Evaluation, merge_aux
from bilevel_flax.oracles.gradients import (
    inner_value_and_grads,
    outer_value_and_grads,
)
from bilevel_flax.oracles.jaxprs import coarsest
from bilevel_flax.tree import is_inexact, norm


def evaluate_by_penalty(
    problem: Problem,
    variables: Variables,
    batch: Batch,
    model_state: PyTree = None,
    rngs: Any = (None, None),
    *,
    penalty: Any = None,
) -> Evaluation:
    """`evaluate_all` from three backprops: of G at z and at y = z + v/λ, of F at y (3 units).

    Args:
        problem: the problem; its `derivatives` are not asked for.
        variables: the point (z, v, x).
        batch: both sides.
        model_state: mutable state of a stateful problem; G at z moves it.
        rngs: the keys of (G, F).
        penalty: λ at most, a scalar. Y comes no closer to z than √eps · max(1, ‖z‖), with eps the
            machine precision of what G computes in: there the bias, which falls with the distance,
            and the rounding of the differences, which grows as it falls, are of one size. A λ that
            would bring it closer (v starts near 0) is lowered to that; None: always there.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> evaluation = bf.oracles.evaluate_by_penalty(
        ...     problem, point, bf.Batch(1.0, 1.0), penalty=jnp.array(4.0)
        ... )
        >>> float(evaluation.oracles.hvp), float(evaluation.oracles.cross_jvp)  # exact
        (1.0, -1.0)
    """
    z, v, x = variables
    check_adjoint(z, v)

    def inner(z):
        return inner_value_and_grads(problem, z, x, batch.inner, model_state, rngs[0])

    eps = coarsest(jax.make_jaxpr(lambda z: inner(z)[0][0])(z))
    length = norm(v)
    distance = eps**0.5 * jnp.maximum(1.0, norm(z))
    resolved = jnp.where(length > 0, length / distance, 1.0)
    penalty = resolved if penalty is None else jnp.minimum(penalty, resolved)
    y = jax.tree.map(lambda a, b: a + b / _like(penalty, a) if is_inexact(a) else a, z, v)
    (inner_loss, inner_aux), grad, direct = inner(z)
    _, grad_y, direct_y = inner(y)
    state = inner_aux.model_state if problem.outer_updates_state else model_state
    (outer_loss, outer_aux), *outer_grads = outer_value_and_grads(
        problem, y, x, batch.outer, state, rngs[1]
    )

    # Of v = 0 the products are 0: two gradients at one point may be rounded in two ways.
    factor = jnp.where(length > 0, penalty, 0.0)

    def product(after, before):
        if rows.is_rows(after):
            return Rows(after.index, product(after.values, before.values))
        return _like(factor, after) * (after - before) if is_inexact(after) else after

    hvp, cross = (
        jax.tree.map(product, *pair, is_leaf=rows.is_rows)
        for pair in ((grad_y, grad), (direct_y, direct))
    )
    oracles = Oracles(grad, hvp, cross, *outer_grads)
    model_state, metrics = merge_aux(problem, inner_aux, outer_aux)
    return Evaluation(oracles, inner_loss, outer_loss, model_state, metrics)


def _like(penalty: Any, leaf: jax.Array) -> jax.Array:
    return jnp.asarray(penalty, leaf.dtype)
