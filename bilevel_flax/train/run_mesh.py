"""The devices of a run, from its config."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

from bilevel_flax import sharding
from bilevel_flax.base import Batch
from bilevel_flax.sharding.context import in_mesh
from bilevel_flax.sharding.layout import place
from bilevel_flax.train import config as configs
from bilevel_flax.train.task import Task

# How the reductions of a step are placed.
COLLECTIVES = ("floor", "xla")


def make_layout(config: configs.Config, task: Task) -> tuple[sharding.Layout | None, Task, str]:
    """Where a run's arrays lie, and the task as it is to be solved there.

    Args:
        config: its keys `mesh` ("data=2,fsdp=4"; None: one device, or with several processes
            data over all devices), `rules` (optional: pairs of a regular expression and axes, e.g.
            `(("kernel$", "-,fsdp"),)`; None: the task's) and `collectives` ("floor": one reduction
            a step, for losses that are means over examples; "xla": left to XLA's partitioner;
            None: "floor" where a check finds that the losses decompose).
        task: what to solve.

    Returns:
        The layout, or None for one device; the task, its problem made for it; a line for the log.

    Raises:
        ConfigError: a mesh, rules or collectives that cannot be had.
    """
    text, collectives = config.get("mesh"), config.get("collectives")
    if collectives not in (None, *COLLECTIVES):
        raise configs.ConfigError(
            f"--config.collectives={collectives}: choose one of {', '.join(COLLECTIVES)}, or None"
        )
    if text is None:
        if jax.process_count() == 1:
            return None, task, ""
        text = f"data={jax.device_count()}"
    try:
        mesh = sharding.make_mesh(text)
        layout = sharding.Layout(mesh, config.get("rules") or task.rules, task.problem)
        for name, side in (("inner", task.inner), ("outer", task.outer)):
            layout.batches(side.batches, name=f"the {name} data ")
    except ValueError as error:
        raise configs.ConfigError(f"--config.mesh={text}: {error}") from error
    why = "--config.collectives=xla"
    if mesh.shape["tensor"] > 1:
        why = "tensor parallelism"
        if collectives == "floor":
            raise configs.ConfigError(
                f"--config.collectives=floor cannot be had with --config.mesh={text}: take "
                "tensor=1, or leave collectives out"
            )
    elif collectives is None:
        why = _obstacle(config, task, layout)
    elif collectives == "floor":
        why = ""
    if why:
        task = dataclasses.replace(task, problem=in_mesh(sharding.whole(task.problem), mesh))
        return layout, task, f"mesh {text}: reductions are left to XLA's partitioner ({why})"
    problem = sharding.data_parallel(task.problem, mesh, layout.rules)
    task = dataclasses.replace(task, problem=problem)
    return layout, task, f"mesh {text}: one reduction a step"


def _obstacle(config: configs.Config, task: Task, layout: sharding.Layout) -> str:
    """Why one reduction a step would be wrong here, or ""."""
    start = task.init(jax.random.split(jax.random.PRNGKey(config.seed))[0])
    mesh = layout.mesh
    try:
        specs = sharding.param_specs(start.inner_params, mesh, layout.rules)
    except ValueError as error:
        raise configs.ConfigError(f"--config.rules: {error}") from error
    first = np.array(0)
    z = jax.tree.map(
        lambda leaf, spec: place(leaf, NamedSharding(mesh, spec)), start.inner_params, specs
    )
    reason = sharding.decomposition(
        task.problem,
        mesh,
        z,
        layout.place_everywhere(start.outer_params),
        Batch(*(layout.place_batches(side.batches, first) for side in (task.inner, task.outer))),
        model_state=layout.place_everywhere(start.model_state),
        rng=layout.place_everywhere(np.asarray(jax.random.PRNGKey(config.seed))),
    )
    if reason and task.problem.stateful:
        reason += "; if that is dropout, --config.collectives=floor is right"
    return reason
