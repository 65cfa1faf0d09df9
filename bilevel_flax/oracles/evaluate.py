"""The five quantities at one point on one pair of minibatches, or those of them that are needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from bilevel_flax.base import Aux, Batch, Metrics, Oracles, Problem, PyTree, Variables
from bilevel_flax.oracles.derivatives import (
    inner_grad_and_cross,
    inner_products,
)
from bilevel_flax.oracles.gradients import (
    inner_value_and_grad,
    outer_grads,
    outer_value_and_grads,
)
from bilevel_flax.per_sample import add as add_rows
from bilevel_flax.per_sample import dense_leaves
from bilevel_flax.tree import add, norm, ratio

NOTHING = Oracles(None, None, None, None, None)


class Evaluation(NamedTuple):
    """The oracles on one minibatch and what else the same forward passes gave.

    Attributes:
        oracles: the five quantities; those of a side whose batch is None are None.
        inner_loss: G on the minibatch, or None.
        outer_loss: F on the minibatch, or None.
        model_state: the mutable state after the step (stateful problems).
        metrics: the user's scalars, `inner_` and `outer_` before their names.
        residual: the adjoint's relative residual; None: not evaluated.
        product: ‖Hv‖, or None.
        through_inner: ‖∇²₂₁G v‖ / ‖D_x‖ over the leaves of x that are not per-sample, or None.
        directions: (D_z, D_v, D_x) where `Oracle.directions` or `Oracle.difference` was asked.
        codes: what stands for the oracles of a linear model (`residual_codes.Codes`), or None.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> evaluation = bf.oracles.evaluate_all(problem, point, bf.Batch(1.0, 1.0))
        >>> float(evaluation.inner_loss), float(evaluation.oracles.hvp)
        (4.5, 1.0)
    """

    oracles: Oracles
    inner_loss: Any
    outer_loss: Any
    model_state: PyTree
    metrics: Metrics
    residual: Any = None
    product: Any = None
    through_inner: Any = None
    directions: Variables | None = None
    codes: Any = None


def evaluate_all(
    problem: Problem, variables: Variables, batch: Batch, model_state=None, rngs=(None, None)
) -> Evaluation:
    """The oracles with losses, state and metrics (4 units); `rngs` are the keys of (G, F).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> evaluation = bf.oracles.evaluate_all(problem, point, bf.Batch(1.0, 1.0))
        >>> float(evaluation.oracles.inner_grad), float(evaluation.inner_loss)
        (-3.0, 4.5)
    """
    z, _, x = variables
    inner_loss = outer_loss = grad = product = cross = outer_inner = outer_outer = None
    inner_aux = outer_aux = Aux(model_state)
    inner_rng, outer_rng = rngs
    if batch.inner is not None:
        (inner_loss, inner_aux), grad, product, cross = inner_products(
            problem, variables, batch.inner, model_state, inner_rng
        )
    if batch.outer is not None:
        state = inner_aux.model_state if problem.outer_updates_state else model_state
        (outer_loss, outer_aux), outer_inner, outer_outer = outer_value_and_grads(
            problem, z, x, batch.outer, state, outer_rng
        )
    oracles = Oracles(grad, product, cross, outer_inner, outer_outer)
    return Evaluation(oracles, inner_loss, outer_loss, *merge_aux(problem, inner_aux, outer_aux))


def evaluate_inner(
    problem: Problem, variables: Variables, batch: Batch, model_state=None, rngs=(None, None)
) -> Evaluation:
    """∇₁G alone (1 unit); F is not evaluated, an `outer_updates_state` skipped.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> evaluation = bf.oracles.evaluate_inner(problem, point, bf.Batch(1.0, 1.0))
        >>> float(evaluation.oracles.inner_grad), evaluation.oracles.hvp
        (-3.0, None)
    """
    (loss, aux), grad = inner_value_and_grad(
        problem, variables.inner, variables.outer, batch.inner, model_state, rngs[0]
    )
    oracles = NOTHING._replace(inner_grad=grad)
    return Evaluation(oracles, loss, None, aux.model_state, _named("inner", aux))


def evaluate_without_hvp(
    problem: Problem, variables: Variables, batch: Batch, model_state=None, rngs=(None, None)
) -> Evaluation:
    """∇₁G, ∇²₂₁G v and ∇₂F; Hv and ∇₁F are left out.

    F is not evaluated where x has only per-sample leaves or F does not use it; an
    `outer_updates_state` is skipped.

    Raises:
        ValueError: as `inner_grad_and_cross`.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> evaluation = bf.oracles.evaluate_without_hvp(problem, point, bf.Batch(1.0, 1.0))
        >>> float(evaluation.oracles.cross_jvp), evaluation.oracles.hvp
        (-1.0, None)
    """
    z, _, x = variables
    (loss, aux), grad, cross = inner_grad_and_cross(
        problem, variables, batch.inner, model_state, rngs[0]
    )
    _, outer_grad = outer_grads(problem, z, x, batch.outer, model_state, rngs[1])
    oracles = Oracles(grad, None, cross, None, outer_grad)
    return Evaluation(oracles, loss, None, aux.model_state, _named("inner", aux))


def evaluate(problem: Problem, variables: Variables, batch: Batch, model_state=None, rng=None):
    """The five quantities at one point on one pair of minibatches: 4 gradient units.

    Args:
        problem: the problem.
        variables: the point (z, v, x); v has z's tree, shapes and dtypes.
        batch: `batch.inner` for G, `batch.outer` for F; either may be None, then its quantities
            are None.
        model_state: mutable state of a stateful problem.
        rng: key of a stateful problem; split once between G and F.

    Returns:
        `Oracles`; for stateful problems `(Oracles, Aux(new_model_state, metrics))`.

    Raises:
        TypeError: a loss does not return a real scalar, or forward mode cannot differentiate it.
        ValueError: inner and adjoint trees differ; `batch["index"]` is missing.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x * batch) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: (z * batch).sum(),
        ... )
        >>> point = bf.Variables(jnp.zeros(2), jnp.ones(2), jnp.array(3.0))
        >>> oracles = bf.oracles.evaluate(problem, point, bf.Batch(jnp.ones(2), jnp.ones(2)))
        >>> oracles.hvp.tolist(), float(oracles.cross_jvp)
        ([1.0, 1.0], -2.0)
    """
    rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
    evaluation = evaluate_all(problem, variables, batch, model_state, rngs)
    if problem.stateful:
        return evaluation.oracles, Aux(evaluation.model_state, evaluation.metrics)
    return evaluation.oracles


def residual(oracles: Oracles) -> jax.Array:
    """‖Hv + ∇₁F‖ / ‖∇₁F‖ on a pair of minibatches; where ∇₁F = 0: 0 if Hv = 0, else ∞.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> solved = point._replace(adjoint=jnp.array(-1.0))
        >>> for v in (point, solved):
        ...     oracles = bf.oracles.evaluate(problem, v, bf.Batch(1.0, 1.0))
        ...     print(float(bf.oracles.residual(oracles)))
        2.0
        0.0
    """
    top = norm(add(oracles.hvp, oracles.outer_grad_inner))
    return ratio(top, norm(oracles.outer_grad_inner))


def through_inner(oracles: Oracles) -> jax.Array:
    """‖∇²₂₁G v‖ / ‖D_x‖ over the dense leaves of x: how much of D_x goes by way of z."""
    whole = add_rows(oracles.cross_jvp, oracles.outer_grad_outer)
    return ratio(norm(dense_leaves(oracles.cross_jvp)), norm(dense_leaves(whole)))


def _named(side: str, aux: Aux) -> Metrics:
    return {f"{side}_{name}": value for name, value in aux.metrics.items()}


def merge_aux(problem: Problem, inner: Aux, outer: Aux) -> tuple[PyTree, Metrics]:
    """`(model_state, metrics)` of a step from what G and F returned beside their values."""
    last = outer if problem.outer_updates_state else inner
    return last.model_state, {**_named("inner", inner), **_named("outer", outer)}
