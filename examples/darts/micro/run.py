"""One search after the other, compiled once for each method."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.outer import architecture
from bilevel_flax.train.errors import Diverged
from examples.darts.micro import methods as micro_methods
from examples.darts.micro.search import CELL, Search
from examples.darts.micro.space import OPERATIONS, Genotype, check

# A record of x and of the signals every so many steps.
RECORD_EVERY = 10


class Found(NamedTuple):
    """What a search ended with.

    Attributes:
        genotype: what it chose, by validation information alone.
        weights: float32 [4, 5], the mixture at the end.
        history: float32 [records, 4, 5], the mixture every RECORD_EVERY steps.
        residuals: float64 [records], the adjoint's residual, a mean over these steps.
        accuracy: of the supernet on F's digits.
        oracle_units: full passes included.
        seconds: without compilation.
        z: the supernet's parameters.
    """

    genotype: Genotype
    weights: np.ndarray
    history: np.ndarray
    residuals: np.ndarray
    accuracy: float
    oracle_units: float
    seconds: float
    z: dict


class Searcher:
    """Runs a method's searches.

    Args:
        method: one of `micro_methods.METHODS`.
        budget: gradient units of a search.
        **settings: further arguments of `micro_methods.make_solver`.

    Attributes:
        steps: of a search.
        traces: how often the step was traced.
    """

    def __init__(self, method: str, budget: float = micro_methods.BUDGET, **settings):
        self.method, self.steps, self._budget = method, 0, budget
        self.traces = 0
        self._settings = settings
        self._solver: bf.BilevelSolver | None = None

    def _prepare(self, search: Search) -> bf.BilevelSolver:
        if self._solver is not None:
            return self._solver
        counts = (search.inner.num_batches, search.outer.num_batches)
        self.steps = micro_methods.steps_of(self.method, self._budget)
        # The losses are the same for every seed; the data are arguments.
        solver = micro_methods.make_solver(
            search.problem, self.method, self.steps, *counts, **self._settings
        )

        def pick(side, position):
            return jax.tree.map(lambda leaf: leaf[position], side)

        def update(state, inner, outer, i, j):
            self.traces += 1
            return solver.update(state, bf.Batch(pick(inner, i), pick(outer, j), i, j))

        def refresh(state, inner, outer, cursor):
            is_inner = cursor < counts[0]
            if is_inner:
                return solver.refresh(state, bf.Batch(pick(inner, cursor), None, cursor, None))
            at = cursor - counts[0]
            return solver.refresh(state, bf.Batch(None, pick(outer, at), None, at))

        self._update = jax.jit(update, donate_argnums=0)
        self._refresh = jax.jit(refresh, donate_argnums=0, static_argnums=3)
        self._solver = solver
        return solver

    def __call__(self, search: Search, seed: int) -> Found:
        """One search.

        Args:
            search: problem and data; the problem of the first call serves all others.
            seed: of z, x and the order of the minibatches.

        Raises:
            Diverged: a direction was not finite.
        """
        solver = self._prepare(search)
        of_start, of_run = jax.random.split(jax.random.key(seed))
        z, x = search.init(of_start)
        state = solver.init(z, x, rng=of_run)
        inner, outer = (jax.tree.map(jnp.asarray, side.batches) for side in search[1:3])
        order = [
            data.Sampler(side.num_batches, 2 * seed + number).ids(0, self.steps)
            for number, side in enumerate(search[1:3])
        ]
        history, residuals, recent, units = [], [], [], 0.0
        compiled = self.traces > 0
        began = time.perf_counter()
        for step in range(self.steps):
            while int(solver.next_refresh(state)) <= step:
                cursor = int(solver.refresh_cursor(state))
                state = self._refresh(state, inner, outer, cursor)
                units += solver.refresh_units[cursor >= search.inner.num_batches]
            state, info = self._update(state, inner, outer, order[0][step], order[1][step])
            if not compiled:
                jax.block_until_ready(info)
                compiled, began = True, time.perf_counter()
            recent.append(info)
            if (step + 1) % RECORD_EVERY == 0 or step + 1 == self.steps:
                if not all(bool(flag) for flag in jax.tree.leaves([i.finite for i in recent])):
                    raise Diverged(f"{self.method}, seed {seed}: not finite at step {step + 1}")
                history.append(np.asarray(jax.nn.softmax(state.outer_params[CELL], -1)))
                residuals.append(np.mean([float(i.adjoint_residual) for i in recent]))
                units += sum(float(i.oracle_units) for i in recent)
                recent = []
        seconds = time.perf_counter() - began
        weights = history[-1]
        return Found(
            genotype=derive(weights, search.names),
            weights=weights,
            history=np.stack(history),
            residuals=np.array(residuals),
            accuracy=search.accuracy(state.inner_params, weights),
            oracle_units=units,
            seconds=seconds,
            z=state.inner_params,
        )


def derive(weights: np.ndarray, names: tuple[str, ...] = OPERATIONS) -> Genotype:
    """The strongest operation of each edge, `none` left out: DARTS's rule.

    Normalisation undoes the scale of an edge, so that the weight of `none` says little about it,
    and one `none` in the row of edges disconnects them all.
    """
    chosen = architecture.strongest(weights, names, leave_out=("none",))
    return check(chosen, "the derived genotype")
