"""Is a run well? Cheap measurements on fixed held minibatches, every so often, while it goes on.

What each value means, where it is healthy, and what to do when it is not: `docs/health.md`. All
of it together costs a set share of the run's gradient units (3 % by default), planned before the
first step, so that a run measures at the same steps whether or not it was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax import data, diagnostics, oracles
from bilevel_flax.base import BilevelSolver, PyTree, TrainState, Variables
from bilevel_flax.train import multihost as distributed
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import Task
from bilevel_flax.tree import norm

_PROBES = (4, 10)  # of a run, at least and at most
_REHEARSED = 4  # steps, for their lengths
# Minibatches of a side. With fewer the values say more about the minibatches than about the run:
# v solves the system of all data, and that of 1,000 examples has another solution.
_HELD, _CHECKED, _CHECKED_AT_THE_END = 32, 64, 128
_ITERATIONS, _ITERATIONS_AT_THE_END = 4, (10, 50)
_SHARE_OF_THE_END = 0.05
# A Hessian-vector product is a gradient of twice the length with its tangents: 3 units in time,
# though the papers count 1.
_HVP_UNITS = 3.0


class Plan(NamedTuple):
    """When what is measured.

    Attributes:
        every: steps between two probes; 0: none.
        check_every: steps between two checks of the hypergradient, a multiple of `every`; 0: only
            the one at the end.
        last_iterations: products that the one at the end takes.
    """

    every: int
    check_every: int
    last_iterations: int


def plan(
    steps: int,
    units: float,
    minibatches: int,
    *,
    share: float = 0.03,
    every: int | None = None,
    grid: int = 1,
) -> Plan:
    """Fits the measurements into a share of the run.

    The check at the end comes on top: 5 % of the run, or ten products where that is not enough.

    Args:
        steps: of the run.
        units: gradient units of a step.
        minibatches: of the larger side.
        share: of steps · units, in [0, 1]; 0 measures nothing.
        every: steps between two probes; None: four to ten probes a run. 0 measures nothing.
        grid: probes fall on multiples of it, where other values are logged.

    Raises:
        ValueError: `share` or `every` is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"health.share={share} must lie in [0, 1]: a share of the run's cost")
    if every is not None and (not isinstance(every, int) or every < 0):
        raise ValueError(f"health.every={every!r} must be an integer >= 0, or None")
    per_product = _HVP_UNITS * min(_CHECKED_AT_THE_END, minibatches)
    last = int(np.clip(_SHARE_OF_THE_END * steps * units / per_product, *_ITERATIONS_AT_THE_END))
    if every == 0 or share == 0:
        return Plan(0, 0, last)
    half = share * steps * units / 2  # for the probes, and as much for the checks
    if every is None:
        a_probe = min(_HELD, minibatches) * (_HVP_UNITS + 1) + _REHEARSED * units
        probes = int(np.clip(half / a_probe, *_PROBES))
        every = grid * -(-steps // (probes * grid))
    checks = int(half / (_HVP_UNITS * _ITERATIONS * min(_CHECKED, minibatches)))
    check_every = every * max(1, -(-steps // ((checks + 1) * every))) if checks else 0
    return Plan(every, check_every, last)


class Monitor:
    """Measures a run.

    Args:
        task: the run's.
        solver: the run's.
        loop: the run's.
        steps: of the run.
        outer_params: x at the start; its size is the unit of `health/outer_size`.
        settings: `share` and `every`, as `plan` takes them.
        grid: as `plan`.
        say: prints a line.

    Attributes:
        plan: what `plan` made of it.
    """

    def __init__(
        self,
        task: Task,
        solver: BilevelSolver,
        loop: StepRunner,
        steps: int,
        outer_params: PyTree,
        settings: Mapping[str, Any],
        grid: int = 1,
        say: Callable[[str], None] = print,
    ):
        chosen = {key: settings[key] for key in ("share", "every") if key in settings}
        minibatches = max(task.inner.num_batches, task.outer.num_batches)
        self.plan = plan(steps, solver.units, minibatches, grid=grid, **chosen)
        self._task, self._loop, self._steps, self._say = task, loop, steps, say
        self._start = np.maximum(1.0, float(_root_mean_square(outer_params)))
        self._rehearses: bool | None = None
        self._processes = distributed.Channel("health")
        if self.plan.every:
            sides = (task.problem, task.inner, task.outer)
            self._residual = diagnostics.probe_estimator(*sides, _HELD)
            self._losses = self._make_losses()

    def due(self, step: int) -> bool:
        """Whether there is a probe after `step` steps."""
        return bool(self.plan.every) and (step % self.plan.every == 0 or step == self._steps)

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """The probe's values, by name; those that cannot be had are left out."""
        whole = distributed.gather_to_host(state)
        residual, negative = self._residual(whole)
        found = {"adjoint_residual": residual, "health/negative_curvature": negative}
        if step < self._steps:  # then the schedules are at their end
            found |= self._step_lengths(state, step)
        found["health/outer_size"] = _root_mean_square(whole.outer_params) / self._start
        if self._losses is not None:
            found |= self._losses(whole)
        every = self.plan.check_every
        if step == self._steps:
            found |= self.last_check(whole)
        elif every and step % every == 0:
            found |= _check(self._task, whole, _CHECKED, _ITERATIONS)
        values = {name: float(value) for name, value in found.items()}
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def last_check(self, state: TrainState) -> dict[str, float]:
        """The check at the end of a run: `hypergradient_cosine` and what to make of it."""
        return _check(self._task, state, _CHECKED_AT_THE_END, self.plan.last_iterations)

    def _step_lengths(self, state: TrainState, step: int) -> dict[str, Any]:
        if self._rehearses is None:
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            self._rehearses = self._processes.broadcast(data.fits_on_device(size))
            if not self._rehearses:
                self._say(
                    f"health: step lengths are not measured, the state ({size / 2**30:.1f} GiB) "
                    "does not fit twice"
                )
        if not self._rehearses:
            return {}
        before = state.variables
        after, taken, _ = self._loop.rehearse(state, step, _REHEARSED)
        lengths = _relative_lengths(before, after.variables)
        return {
            f"health/step_{name}": value / max(taken, 1)
            for name, value in lengths._asdict().items()
        }

    def _make_losses(self) -> Callable[[TrainState], dict[str, Any]] | None:
        if self._task.held_out is None:
            return None
        problem = self._task.problem
        sides = [
            jax.device_put((side.batches, side.weights))
            for side in (
                data.subsample(self._task.outer, _HELD),
                data.subsample(self._task.held_out, _HELD),
            )
        ]

        @jax.jit
        def losses(state, seen, held_out):
            def one(batch):
                z, _, x = state.variables
                return oracles.outer_value_and_grads(
                    problem, z, x, batch, state.model_state, state.rng
                )[0][0]

            def mean(side):
                batches, weights = side
                values = jax.lax.map(one, batches)
                return jnp.vdot(weights, values), jnp.var(values) / len(weights)

            (low, low_error), (high, high_error) = mean(seen), mean(held_out)
            return {
                "health/loss_seen": low,
                "health/loss_held_out": high,
                "health/loss_gap_error": jnp.sqrt(low_error + high_error),
            }

        return lambda state: losses(state, *sides)


def _check(task: Task, state: TrainState, minibatches: int, iterations: int) -> dict[str, float]:
    found = diagnostics.hypergradient_check(
        task.problem,
        state,
        data.subsample(task.inner, minibatches),
        data.subsample(task.outer, minibatches),
        method="minres",
        # From 0 so few products would not reach a v to compare with.
        warm_start=True,
        max_iterations=iterations,
        tolerance=1e-3,
    )
    return {
        "hypergradient_cosine": found.cosine,
        "health/reference_residual": found.reference_residual,
        "health/smallest_curvature": found.smallest_curvature,
        "health/largest_curvature": found.largest_curvature,
    }


def _root_mean_square(tree: PyTree) -> jax.Array:
    entries = sum(leaf.size for leaf in jax.tree.leaves(tree) if oracles.is_inexact(leaf))
    return norm(tree) / np.sqrt(max(entries, 1))


@jax.jit
def _relative_lengths(before: Variables, after: Variables) -> Variables:
    def relative(old, new):
        moved = jax.tree.map(
            lambda a, b: b - a if oracles.is_inexact(a) else jnp.zeros(()), old, new
        )
        size = norm(old)
        return jnp.where(size > 0, norm(moved) / jnp.where(size > 0, size, 1.0), 0.0)

    return Variables(*(relative(old, new) for old, new in zip(before, after, strict=True)))
