"""The oracles of one step of a single-loop method: checked, weighted, with keys of their own."""

from __future__ import annotations

from typing import Any

from bilevel_flax import checks
from bilevel_flax.base import Batch, Estimator, Problem, PyTree
from bilevel_flax.minibatches import importance_factors
from bilevel_flax.oracles.oracle import Oracle, bind


class Binder:
    """A problem with the shares of its minibatches, for an estimator.

    Args:
        problem: the problem.
        estimator: says which keys and ids it needs.
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
        self._problem, self._name, self._fixed_keys = problem, name, estimator.needs_ids
        self._second_order = estimator.second_order
        self._factors = (
            importance_factors("inner_weights", inner_weights),
            importance_factors("outer_weights", outer_weights),
        )
        self._needed = {
            side: estimator.needs_ids or factor is not None
            for side, factor in zip(("inner", "outer"), self._factors, strict=True)
        }

    def part(
        self, state: Any, batch: Batch, trainable: PyTree = None, decay: PyTree = None
    ) -> Oracle:
        """The oracles on a batch of which a side may be missing (a full pass)."""
        checks.require_ids(batch, self._name, self._needed, scalars=True)
        keys = {"factors": self._factors, "fixed_keys": self._fixed_keys}
        return bind(self._problem, state, batch, trainable=trainable, decay=decay, **keys)

    def step(
        self, state: Any, batch: Batch, trainable: PyTree = None, decay: PyTree = None
    ) -> Oracle:
        """The oracles of an update, the user's losses checked."""
        checks.batch(batch)
        oracle = self.part(state, batch, trainable, decay)
        args = self._problem, state.variables, batch, state.model_state, oracle.rngs[0]
        checks.losses(*args, second_order=self._second_order)
        return oracle
