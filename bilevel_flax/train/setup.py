"""What a run is made of, from its config: the task, the solver, the devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from bilevel_flax import data, oracles, sharding
from bilevel_flax.base import Batch, BilevelSolver
from bilevel_flax.sharding.context import in_mesh
from bilevel_flax.sharding.layout import place
from bilevel_flax.train import config as configs
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.task import Task


def make_task(config: RunConfig | configs.Config) -> Task:
    """The task that `config.task` describes, its problem computed as `config.problem` says.

    Raises:
        ConfigError: it is no task, reads a key that the config lacks, or `Problem` refuses a value.
    """
    run = RunConfig.read(config)
    with configs.naming_missing_keys(run.source), configs.refusing_unread_slips(run.source):
        task = configs.resolve(run.task, config=run.source)
    if not isinstance(task, Task):
        raise configs.ConfigError(
            f"{run.task[configs.CALL]} returned a {type(task).__name__}, not a "
            "bilevel_flax.train.task.Task (docs/loops.md)"
        )
    settings = dataclasses.asdict(run.problem)
    count = settings["microbatches"]
    for name, side in (("inner", task.inner), ("outer", task.outer)):
        if side.batch_size % count:
            raise configs.ConfigError(
                f"--config.problem.microbatches={count} does not divide the {name} batch size "
                f"{side.batch_size}"
            )
    # A task may have made choices of its own; only what the config asks for replaces them.
    defaults = dataclasses.asdict(type(run.problem)())
    chosen = {name: value for name, value in settings.items() if value != defaults[name]}
    try:
        problem = oracles.configured(task.problem, chosen)
    except ValueError as error:
        raise configs.ConfigError(f"--config.problem: {error}") from error
    return dataclasses.replace(task, problem=problem)


def make_solver(solver: Any, task: Task) -> BilevelSolver:
    """The solver that `config.solver` describes, handed what it takes of problem and data.

    Raises:
        ConfigError: it cannot be made, or is no solver.
    """
    first = np.array(0)
    result = configs.resolve(
        solver,
        problem=task.problem,
        num_inner_batches=task.inner.num_batches,
        num_outer_batches=task.outer.num_batches,
        inner_weights=task.inner.weights if task.inner.ragged else None,
        outer_weights=task.outer.weights if task.outer.ragged else None,
        example_batch=Batch(data.gather(task.inner, first), data.gather(task.outer, first)),
    )
    if not isinstance(result, BilevelSolver):
        raise configs.ConfigError(
            f"config.solver: {solver.get(configs.CALL)} returned a {type(result).__name__}, not a "
            "BilevelSolver; `bilevel-flax solvers` lists them"
        )
    return result


def make_layout(run: RunConfig, task: Task) -> tuple[sharding.Layout | None, Task, str]:
    """Where a run's arrays lie, and the task as it is to be solved there.

    Args:
        run: its `mesh` (None: one device, or with several processes data over all devices), `rules`
            (pairs of a regular expression and axes, e.g. `(("kernel$", "-,fsdp"),)`) and
            `reduction` ("shard_map": one reduction a step, for losses that are means over examples;
            "gspmd": left to XLA's partitioner; None: the former where a check finds that the losses
            decompose).
        task: what to solve.

    Returns:
        The layout, or None for one device; the task, its problem made for it; a line for the log.

    Raises:
        ConfigError: a mesh, rules or a reduction that cannot be had.
    """
    text = run.mesh
    if text is None:
        if jax.process_count() == 1:
            return None, task, ""
        text = f"data={jax.device_count()}"
    try:
        mesh = sharding.make_mesh(text)
        layout = sharding.Layout(mesh, run.rules or task.rules, task.problem)
        for name, side in (("inner", task.inner), ("outer", task.outer)):
            layout.batches(side.batches, name=f"the {name} data ")
    except ValueError as error:
        raise configs.ConfigError(f"--config.mesh={text}: {error}") from error
    obstacle = _obstacle(run, task, layout)
    if obstacle:
        task = dataclasses.replace(task, problem=in_mesh(sharding.whole(task.problem), mesh))
        return layout, task, f"mesh {text}: reductions are left to XLA's partitioner ({obstacle})"
    problem = sharding.data_parallel(task.problem, mesh, layout.rules)
    task = dataclasses.replace(task, problem=problem)
    return layout, task, f"mesh {text}: one reduction a step"


def _obstacle(run: RunConfig, task: Task, layout: sharding.Layout) -> str:
    """Why there is not to be one reduction a step, or ""."""
    if layout.mesh.shape["tensor"] > 1:
        if run.reduction == "shard_map":
            raise configs.ConfigError(
                f"--config.reduction=shard_map cannot be had with --config.mesh={run.mesh}: take "
                "tensor=1, or leave the reduction out"
            )
        return "tensor parallelism"
    if run.reduction is not None:
        return "" if run.reduction == "shard_map" else "--config.reduction=gspmd"
    initial = task.start(jax.random.split(jax.random.PRNGKey(run.seed))[0])
    mesh = layout.mesh
    try:
        specs = sharding.param_specs(initial.inner_params, mesh, layout.rules)
    except ValueError as error:
        raise configs.ConfigError(f"--config.rules: {error}") from error
    first = np.array(0)
    z = jax.tree.map(
        lambda leaf, spec: place(leaf, NamedSharding(mesh, spec)), initial.inner_params, specs
    )
    reason = sharding.decomposition(
        task.problem,
        mesh,
        z,
        layout.place_everywhere(initial.outer_params),
        Batch(*(layout.place_batches(side.batches, first) for side in (task.inner, task.outer))),
        model_state=layout.place_everywhere(initial.model_state),
        rng=layout.place_everywhere(np.asarray(jax.random.PRNGKey(run.seed))),
    )
    if reason and task.problem.stateful:
        reason += "; if that is dropout, --config.reduction=shard_map is right"
    return reason
