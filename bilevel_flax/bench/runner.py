"""Runs with one budget, compiled once for all pairs of steps of a method."""

from __future__ import annotations

import jax

from bilevel_flax.base import BilevelSolver
from bilevel_flax.bench import methods, one_run, searches, steps
from bilevel_flax.bench.options import CLOCKS
from bilevel_flax.bench.results import FINISHED, SCREENED, Key, Row
from bilevel_flax.bench.tasks import BenchTask
from bilevel_flax.train.step_runner import StepRunner

# A pair of a grid is judged by the end of its run.
_EVALUATIONS, _SCREENING_EVALUATIONS = 40, 4
_CHUNK_STEPS = 4000


class Runner:
    """Does runs one after the other.

    Args:
        seconds: the budget of each.
        clock: "wall" or "cpu".
    """

    def __init__(self, seconds: float, clock: str):
        self._seconds, self._clock = seconds, CLOCKS[clock]
        self._task: BenchTask | None = None
        self._name = ""
        self._step_runner: StepRunner | None = None

    def run(
        self, bench_task: BenchTask, key: Key, pair: tuple[float, float], screening: bool = False
    ) -> list[Row]:
        """One run.

        Args:
            bench_task: the task, made for the run's seed.
            key: solver, seed and params.
            pair: (ρ, ρ/γ).
            screening: measure at few times.

        Returns:
            Its rows; the last one has a status. Once diverged, its values are NaN.

        Raises:
            ConfigError: the budget is over before the first step.
        """
        solver, step_runner = self._prepared(bench_task, key, pair)
        init_rng, run_rng = jax.random.split(jax.random.PRNGKey(key.seed))
        start = bench_task.task.start(init_rng)
        run = one_run.Run(
            bench_task=bench_task,
            key=key,
            ratio=pair[1],
            solver=solver,
            runner=step_runner,
            start=lambda x: solver.init(
                start.inner_params, x, model_state=start.model_state, rng=run_rng
            ),
            outer_params=start.outer_params,
            seconds=self._seconds,
            clock=self._clock,
            evaluations=_SCREENING_EVALUATIONS if screening else _EVALUATIONS,
            end=SCREENED if screening else FINISHED,
        )
        walk = searches.walk if key.solver in methods.SEARCHES else one_run.walk
        return list(walk(run))

    def _prepared(
        self, bench_task: BenchTask, key: Key, pair: tuple[float, float]
    ) -> tuple[BilevelSolver, StepRunner]:
        """The solver with the pair's steps, and a runner at its beginning."""

        def build(rho, ratio):
            return methods.build(key.solver, bench_task, rho, ratio)

        varies = steps.can_vary(build)
        solver = steps.with_steps(build, *pair) if varies else build(*pair)
        if self._step_runner and varies and self._task is bench_task and self._name == key.solver:
            self._step_runner.rewind()
            return solver, self._step_runner
        self.close()
        self._task, self._name = bench_task, key.solver
        self._step_runner = StepRunner(
            solver,
            bench_task.task.inner,
            bench_task.task.outer,
            seed=key.seed,
            capacity=_CHUNK_STEPS,
            target_seconds=min(0.1, self._seconds / 100),
        )
        return solver, self._step_runner

    def close(self) -> None:
        """Frees what the last run left."""
        if self._step_runner:
            self._step_runner.close()
        self._task = self._step_runner = None
