"""All five quantities at one point on one pair of minibatches: 4 gradient units."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax.base import Aux, Batch, Metrics, Oracles, Problem, PyTree, Variables
from bilevel_flax.oracles.derivatives import inner_products, outer_value_and_grads
from bilevel_flax.tree import norm, ratio


class Evaluation(NamedTuple):
    """The oracles on one minibatch and what else the same forward passes gave.

    Attributes:
        oracles: the five quantities; those of a side whose batch is None are None.
        inner_loss: G on the minibatch, or None.
        outer_loss: F on the minibatch, or None.
        model_state: the mutable state after the step (stateful problems).
        metrics: the user's scalars, `inner_` and `outer_` before their names.
        residual: the adjoint's relative residual; None: that of `oracles`.
        components: the oracles taken apart (`linear.Components`), or None.
        directions: what an estimator asked to have combined out of the oracles, or None.
    """

    oracles: Oracles
    inner_loss: Any
    outer_loss: Any
    model_state: PyTree
    metrics: Metrics
    residual: Any = None
    components: Any = None
    directions: Any = None


def merged(problem: Problem, inner: Aux, outer: Aux) -> tuple[PyTree, Metrics]:
    """`(model_state, metrics)` of a step from what G and F returned beside their values."""
    chosen = outer if problem.outer_updates_state else inner
    metrics = {f"inner_{k}": v for k, v in inner.metrics.items()}
    metrics |= {f"outer_{k}": v for k, v in outer.metrics.items()}
    return chosen.model_state, metrics


def evaluate_all(
    problem: Problem, variables: Variables, batch: Batch, model_state=None, rngs=(None, None)
) -> Evaluation:
    """The oracles with losses, state and metrics; `rngs` are the keys of (G, F)."""
    z, _, x = variables
    inner_loss = outer_loss = grad = product = cross = outer_inner = outer_outer = None
    inner_aux = outer_aux = Aux(model_state)
    inner_rng, outer_rng = rngs
    if batch.inner is not None:
        (inner_loss, inner_aux), grad, product, cross = inner_products(
            problem, variables, batch.inner, model_state, inner_rng
        )
    if batch.outer is not None:
        seen = inner_aux.model_state if problem.outer_updates_state else model_state
        (outer_loss, outer_aux), outer_inner, outer_outer = outer_value_and_grads(
            problem, z, x, batch.outer, seen, outer_rng
        )
    oracles = Oracles(grad, product, cross, outer_inner, outer_outer)
    return Evaluation(oracles, inner_loss, outer_loss, *merged(problem, inner_aux, outer_aux))


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
    found = evaluate_all(problem, variables, batch, model_state, rngs)
    if problem.stateful:
        return found.oracles, Aux(found.model_state, found.metrics)
    return found.oracles


def residual(found: Oracles) -> jax.Array:
    """‖Hv + ∇₁F‖ / ‖∇₁F‖ on a pair of minibatches; where ∇₁F = 0: 0 if Hv = 0, else ∞."""
    top = norm(jax.tree.map(jnp.add, found.hvp, found.outer_grad_inner))
    return ratio(top, norm(found.outer_grad_inner))
