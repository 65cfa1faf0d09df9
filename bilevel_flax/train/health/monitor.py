"""Is a run well? Measurements on fixed held minibatches while it goes on.

What each value means, where it is healthy, and what to do when it is not: `docs/health.md`. What
is measured when follows from the config alone, so that a run measures at the same steps whether or
not it was interrupted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax import data, diagnostics, oracles
from bilevel_flax.base import PyTree, TrainState
from bilevel_flax.base.condition import is_condition
from bilevel_flax.train.actions import Schedule
from bilevel_flax.train.task import Task
from bilevel_flax.train.whole_state import gather_to_host
from bilevel_flax.tree import is_inexact, norm

_PROBES = 10  # of a run, at most
_SHARE = 0.03  # of the gradient units of a run, for its probes
# Minibatches of a side. With fewer the values say more about the minibatches than about the run:
# v solves the system of all data, and that of 1,000 examples has another solution.
_HELD, _CHECKED, _CHECKED_AT_THE_END = 32, 64, 128
_PRODUCTS, _PRODUCTS_AT_THE_END = 4, (10, 50)  # with the Hessian, of a check
# Gradient units on a minibatch: a gradient with a Hessian product, and a value alone.
_PRODUCT, _VALUE = 3.0, 1 / 3


class Monitor:
    """Measures a run: the adjoint's residual, the size of x, the hypergradient's cosine.

    Args:
        task: the run's.
        steps: of the run.
        outer_params: x at the start; its size is the unit of `health/outer_size`.
        eval_every: steps between two evaluations.
        every: steps between two probes; None: at ten evaluations of the run at most, and at fewer
            where ten would cost more than 3 % of its gradient units; 0: none.
        units: gradient units of an update.
        check_at_end: whether the last probe checks the hypergradient.

    Attributes:
        schedule: when there is a probe.
    """

    def __init__(
        self,
        task: Task,
        steps: int,
        outer_params: PyTree,
        eval_every: int,
        every: int | None = None,
        units: float = 4.0,
        check_at_end: bool = True,
    ):
        # Counted, not timed: all processes, and a run that is resumed, must measure alike.
        self._budget, probe = _SHARE * steps * units, _probe_units(task)
        if every is None:
            probes = int(np.clip(self._budget / probe, 1, _PROBES))
            every = eval_every * -(-steps // (probes * eval_every))
        self.schedule = Schedule(every, steps)
        self._task, self._steps, self._check_at_end = task, steps, check_at_end
        with_check = probe + _check_units(task, _CHECKED, _PRODUCTS)
        self._check_always = bool(every) and steps // every * with_check <= self._budget
        self._start = np.maximum(1.0, float(_root_mean_square(outer_params)))
        if every:
            sides = (task.problem, task.inner, task.outer)
            self._residual = diagnostics.probe_estimator(*sides, _HELD)
            self._losses = None if task.held_out is None else _outer_losses(task)

    def first_check(self, state: TrainState) -> str:
        """What is wrong with the inner gradient at the start of a run, in one line; "" if nothing.

        Args:
            state: where the run begins.
        """
        if not self.schedule.every:
            return ""
        whole, first = gather_to_host(state), np.array(0)
        minibatch = data.gather(self._task.inner, first)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return diagnostics.check_symmetry(self._task.problem, whole, minibatch).message

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """The probe's values, by name; those that cannot be had are left out."""
        whole = gather_to_host(state)
        residual, negative = self._residual(whole)
        results = {"health/negative_curvature": negative}
        # 0 is the estimate of a residual that is smaller than its own noise: no value to print.
        if residual > 0:
            results["adjoint_residual"] = residual
        results["health/outer_size"] = _root_mean_square(whole.outer_params) / self._start
        if self._losses is not None:
            results |= self._losses(whole)
        if step == self._steps and self._check_at_end:
            results |= self.last_check(whole)
        elif self._check_always:
            results |= _check(self._task, whole, _CHECKED, _PRODUCTS)
        values = {name: float(value) for name, value in results.items()}
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def last_check(self, state: TrainState) -> dict[str, float]:
        """The check at the end of a run: `hypergradient_cosine` and what to make of it."""
        without, with_one = (_check_units(self._task, _CHECKED_AT_THE_END, k) for k in (0, 1))
        affordable = (self._budget - without) / (with_one - without)
        products = int(np.clip(affordable, *_PRODUCTS_AT_THE_END))
        return _check(self._task, state, _CHECKED_AT_THE_END, products)


def _probe_units(task: Task) -> float:
    """Gradient units of a probe."""
    inner, outer = (min(side.num_batches, _HELD) for side in (task.inner, task.outer))
    units = _PRODUCT * inner + outer
    if task.held_out is not None:
        units += _VALUE * (outer + min(task.held_out.num_batches, _HELD))
    return units


def _check_units(task: Task, minibatches: int, products: int) -> float:
    """Gradient units of a check: with the residual at its start, and D_x at two points."""
    inner, outer = (min(side.num_batches, minibatches) for side in (task.inner, task.outer))
    return _PRODUCT * inner * (products + 3) + 2 * outer


def _outer_losses(task: Task) -> Callable[[TrainState], dict[str, Any]]:
    """F on minibatches that x learns from and on held-out ones, and the gap's standard error."""
    problem, held_out = task.problem, task.held_out
    assert held_out is not None
    sides = [
        jax.device_put((side.batches, side.weights))
        for side in (data.subsample(task.outer, _HELD), data.subsample(held_out, _HELD))
    ]

    @jax.jit
    def losses(state, *sides):
        def one(batch):
            z, _, x = state.variables
            return oracles.outer_value_and_grads(
                problem, z, x, batch, state.model_state, state.rng
            )[0][0]

        def mean(batches, weights):
            values = jax.lax.map(one, batches)
            return jnp.vdot(weights, values), jnp.var(values) / len(weights)

        (low, low_error), (high, high_error) = (mean(*side) for side in sides)
        return {
            "health/loss_seen": low,
            "health/loss_held_out": high,
            "health/loss_gap_error": jnp.sqrt(low_error + high_error),
        }

    return lambda state: losses(state, *sides)


def _check(task: Task, state: TrainState, minibatches: int, products: int) -> dict[str, float]:
    check = diagnostics.hypergradient_check(
        task.problem,
        state,
        data.subsample(task.inner, minibatches),
        data.subsample(task.outer, minibatches),
        method="gmres" if is_condition(task.problem.inner_loss) else "minres",
        # From 0 so few products would not reach a v to compare with.
        warm_start=True,
        trainable=_moving(state),
        max_iterations=products,
        tolerance=1e-3,
    )
    return {
        "hypergradient_cosine": check.cosine,
        "health/reference_residual": check.reference_residual,
        "health/smallest_curvature": check.smallest_curvature,
        "health/largest_curvature": check.largest_curvature,
    }


def _moving(state: TrainState) -> PyTree:
    """Which parameters move: v stays 0 where z's optimiser holds them; None: all, or v is new."""
    flags = jax.tree.map(lambda leaf: bool(jnp.any(leaf != 0)), state.adjoint)
    return flags if any(jax.tree.leaves(flags)) else None


def _root_mean_square(tree: PyTree) -> jax.Array:
    entries = sum(leaf.size for leaf in jax.tree.leaves(tree) if is_inexact(leaf))
    return norm(tree) / np.sqrt(max(entries, 1))
