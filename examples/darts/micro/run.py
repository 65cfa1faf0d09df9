"""One search after the other, compiled once for each method."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from bilevel_flax.base import BilevelSolver
from bilevel_flax.train.errors import raise_if_diverged
from bilevel_flax.train.step_runner import StepRunner
from examples.darts import selection
from examples.darts.micro import methods
from examples.darts.micro.search import CELL, Search
from examples.darts.micro.space import OPERATIONS, Genotype, check


class Result(NamedTuple):
    """What a search ended with.

    Attributes:
        genotype: what it chose, by validation information alone.
        weights: float32 [4, operations], the mixture at the end.
        oracle_units: full passes included.
        seconds: of updates and full passes, without compilation.
    """

    genotype: Genotype
    weights: np.ndarray
    oracle_units: float
    seconds: float


class Searcher:
    """Runs a method's searches.

    Args:
        method: one of `methods.METHODS`.
        budget: gradient units of a search.

    Attributes:
        steps: of a search.
    """

    def __init__(self, method: str, budget: float = methods.BUDGET):
        self.method = method
        self.steps = methods.steps_of(method, budget)
        self._solver: BilevelSolver | None = None
        self._compiled: StepRunner | None = None

    def __call__(self, search: Search, seed: int) -> Result:
        """One search.

        Args:
            search: problem and data; the problem of the first call serves all others, for the
                losses are the same for every seed and the data are arguments.
            seed: of z, x and the order of the minibatches.

        Raises:
            Diverged: a direction was not finite.
        """
        if self._solver is None:
            counts = (search.inner.num_batches, search.outer.num_batches)
            self._solver = methods.make_solver(search.problem, self.method, self.steps, *counts)
        solver = self._solver
        loop = StepRunner(solver, search.inner, search.outer, seed=seed, compiled_as=self._compiled)
        init_rng, run_rng = jax.random.split(jax.random.key(seed))
        state, step, units = solver.init(*search.init(init_rng), rng=run_rng), 0, 0.0
        while step < self.steps:
            refresh_step = int(solver.next_refresh(state))
            if refresh_step <= step:
                state, spent = loop.refresh(state)
                units += spent
                continue
            state, info = loop.run(state, step, min(self.steps, refresh_step))
            step += len(info.inner_loss)
            raise_if_diverged(info, step, None)
            units += float(np.sum(info.oracle_units, dtype=np.float64))
        self._compiled = loop
        weights = np.asarray(jax.nn.softmax(state.outer_params[CELL], -1))
        return Result(derive(weights, search.names), weights, units, loop.seconds)


def derive(weights: np.ndarray, names: tuple[str, ...] = OPERATIONS) -> Genotype:
    """The strongest operation of each edge, `none` left out: DARTS's rule.

    Normalisation undoes the scale of an edge, so that the weight of `none` says little about it,
    and one `none` in the row of edges disconnects them all.
    """
    chosen = selection.strongest(weights, names, leave_out=("none",))
    return check(chosen, "the derived genotype")
