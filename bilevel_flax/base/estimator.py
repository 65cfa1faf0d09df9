"""What makes directions out of oracle calls, and thereby a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bilevel_flax.base.variables import PyTree, Variables


class FullPass(NamedTuple):
    """The scheduled passes over all minibatches that a method with memory makes.

    Attributes:
        update: `update(oracle, variables, batch, state) -> state`: one minibatch of a pass;
            `batch.inner` or `batch.outer` is None.
        due: `due(state) -> int32`, the step before which a pass is due.
        cursor: `cursor(state) -> int32`, minibatches of the due pass that are done: first all
            inner ones in order of their ids, then all outer ones.
        units: (inner, outer) gradient units of one minibatch.

    Example:
        >>> import optax, bilevel_flax as bf
        >>> loss = lambda z, x, b: (z - x * b) ** 2
        >>> solver = bf.srba(
        ...     bf.Problem(loss, loss),
        ...     num_inner_batches=8,
        ...     num_outer_batches=4,
        ...     period=12,
        ...     inner=optax.sgd(0.1),
        ...     outer=optax.sgd(0.1),
        ... )
        >>> solver.method.refresh_units  # `FullPass.units` of its estimator
        (3.0, 1.0)
    """

    update: Callable[..., PyTree]
    due: Callable[[PyTree], jax.Array]
    cursor: Callable[[PyTree], jax.Array]
    units: tuple[float, float] = (3.0, 1.0)


class Estimate(NamedTuple):
    """What an estimator makes of a pair of minibatches.

    Attributes:
        directions: (D_z, D_v, D_x).
        state: the estimator's new state.
        evaluation: the `oracles.Evaluation` at the current point: losses, metrics, residual.
        norms: the directions' Euclidean norms, where they are known; None: not yet.
        active: for each variable whether it moves, a bool scalar; one that does not stands still
            bit for bit, the state of its optimiser included. None: it always moves.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> from bilevel_flax.base import Estimate
        >>> def update(oracle, variables, batch, state):  # plain training: v and x stand still
        ...     evaluation = oracle.directions(variables)
        ...     still = evaluation.directions._replace(adjoint=None, outer=None)
        ...     active = bf.Variables(None, jnp.array(False), jnp.array(False))
        ...     return Estimate(evaluation.directions, state, evaluation, active=active)
        >>> estimator = bf.Estimator(lambda variables: None, update)
    """

    directions: Variables
    state: PyTree
    evaluation: Any
    norms: Variables | None = None
    active: Variables = Variables(None, None, None)


class Estimator(NamedTuple):
    """Turns oracle calls into directions; it takes the place of `jax.grad`.

    Attributes:
        init: `init(variables) -> state`.
        update: `update(oracle, variables, batch, state) -> Estimate`. The `oracles.Oracle` that it
            is handed gives `oracle.directions(point)`, all that a method without memory needs;
            `oracle.difference(now, before)`; and `oracle.at(point)`, the five quantities apart.
        full_pass: for methods with memory; None: there are no full passes.
        units: gradient units of one update; one for each gradient, HVP and cross-JVP.
        needs_ids: whether visits of a minibatch are compared: `batch.inner_id` and
            `batch.outer_id` are read, and the rng key of a stateful loss is that of its id.
        second_order: whether it asks for products with second derivatives of G.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> from bilevel_flax.base import Estimate
        >>> def update(oracle, variables, batch, state):  # SOBA's
        ...     evaluation = oracle.directions(variables)
        ...     return Estimate(evaluation.directions, state, evaluation)
        >>> estimator = bf.Estimator(init=lambda variables: None, update=update)
        >>> solver = bf.single_loop(problem, estimator, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    """

    init: Callable[[Variables], PyTree]
    update: Callable[..., Estimate]
    full_pass: FullPass | None = None
    units: float = 4.0
    needs_ids: bool = False
    second_order: bool = True
