"""An estimator bound to a problem: all of a single-loop step before anything moves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from bilevel_flax import checks
from bilevel_flax.base import Batch, Estimate, Estimator, Finite, Problem, PyTree, Variables
from bilevel_flax.minibatches import importance_factors
from bilevel_flax.oracles.oracle import Oracle, bind
from bilevel_flax.solvers.step import direction_norms


class Evaluated(NamedTuple):
    """What a step knows before it moves anything."""

    oracle: Oracle
    estimate: Estimate
    norms: Variables
    finite: Finite


class Evaluator:
    """An estimator bound to a problem and the shares of its minibatches.

    Args:
        problem: the problem.
        estimator: turns oracle calls into directions.
        inner_weights: float [N] or None, as in `Common`.
        outer_weights: float [M] or None.
        name: the method's, for errors.
    """

    def __init__(
        self,
        problem: Problem,
        estimator: Estimator,
        inner_weights: Any,
        outer_weights: Any,
        name: str,
    ):
        self._problem, self._estimator, self._name = problem, estimator, name
        self._factors = (
            importance_factors("inner_weights", inner_weights),
            importance_factors("outer_weights", outer_weights),
        )
        self._needed = {
            side: estimator.needs_ids or factor is not None
            for side, factor in zip(("inner", "outer"), self._factors, strict=True)
        }

    def oracle(self, state: Any, batch: Batch, trainable: PyTree = None) -> Oracle:
        """The oracles of one step, which are asked for with ids where they are needed."""
        checks.require_ids(batch, self._name, self._needed)
        keys = {"factors": self._factors, "fixed_keys": self._estimator.fixed_keys}
        return bind(self._problem, state, batch, trainable=trainable, **keys)

    def update(self, state: Any, batch: Batch, trainable: PyTree = None) -> Evaluated:
        """The directions at a state's point."""
        checks.batch(batch)
        oracle = self.oracle(state, batch, trainable)
        point = state.variables
        checks.losses(self._problem, point, batch, state.model_state, oracle.rngs[0])
        estimate = self._estimator.update(oracle, point, batch, state.estimator_state)
        norms = estimate.norms or direction_norms(estimate.directions)
        finite = Finite(*(jnp.isfinite(value) for value in norms))
        return Evaluated(oracle, estimate, norms, finite)

    def refresh(self, state: Any, batch: Batch, trainable: PyTree = None) -> PyTree:
        """The estimator's state after one minibatch of a full pass."""
        full_pass = self._estimator.full_pass
        assert full_pass is not None
        oracle = self.oracle(state, batch, trainable)
        return full_pass.update(oracle, state.variables, batch, state.estimator_state)
