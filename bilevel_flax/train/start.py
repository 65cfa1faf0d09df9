"""Where a run starts: at step 0, or from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from bilevel_flax.base import BilevelSolver, TrainState
from bilevel_flax.checkpoints.checkpointer import Checkpointer
from bilevel_flax.sharding import Layout
from bilevel_flax.train.errors import Diverged, FiniteCheck
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.task import Task


def initial(
    run: RunConfig, task: Task, solver: BilevelSolver, layout: Layout | None
) -> tuple[TrainState, Any]:
    """The state at step 0, and x as the task gave it."""
    init_rng, run_rng = jax.random.split(jax.random.PRNGKey(run.seed))
    initial = task.start(init_rng)
    state = solver.init(
        initial.inner_params, initial.outer_params, model_state=initial.model_state, rng=run_rng
    )
    return state if layout is None else layout.place_state(state), initial.outer_params


def restore(
    workdir: Path,
    checkpointer: Checkpointer,
    state: TrainState,
    runner: StepRunner,
    check: FiniteCheck,
    messages: list[str],
) -> tuple[TrainState, int, dict[str, Any]]:
    """State, step and position of the newest checkpoint, or of the start.

    Raises:
        Diverged: the checkpoint holds a NaN; every run that goes on from it would fail.
    """
    restored = checkpointer.restore(state)
    if restored is None:
        return state, 0, {}
    for sampler, saved in zip(runner.samplers, restored.meta["samplers"], strict=True):
        sampler.check(saved)
    messages.append(f"resuming {workdir} at step {restored.step}")
    lost = check.first_lost(restored.state)
    if lost is not None:
        raise Diverged(
            f"{workdir / 'checkpoints' / str(restored.step)} holds {lost}, which is not finite: "
            "delete that folder, and the same command goes on from the checkpoint before, or from "
            "the start"
        )
    return restored.state, restored.step, restored.meta
