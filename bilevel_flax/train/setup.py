"""What a run reads from its config, checked."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from bilevel_flax import data
from bilevel_flax.base import Batch, BilevelSolver, Problem
from bilevel_flax.train import config as configs
from bilevel_flax.train.task import Task

_POSITIVE = ("log_every", "eval_every", "checkpoint.every", "checkpoint.keep")


def check_counts(config: configs.Config) -> None:
    """Raises `ConfigError` where a number of steps is none."""
    for name in _POSITIVE:
        value = functools.reduce(lambda node, key: node[key], name.split("."), config)
        if not isinstance(value, int) or value < 1:
            raise configs.ConfigError(f"--config.{name}={value}: must be an integer of 1 or more")
    name = "epochs" if config.steps is None else "steps"
    if config[name] <= 0:
        raise configs.ConfigError(f"--config.{name}={config[name]}: must be above 0")


# What `config.problem` may set: how the derivatives are computed, not what they are.
_SETTINGS = ("remat", "microbatches", "compute_dtype", "derivatives")


def make_task(config: configs.Config) -> Task:
    """The task that `config.task` describes, its problem computed as `config.problem` says.

    Raises:
        ConfigError: an unknown key of `config.problem`, or a value that `Problem` refuses.
    """
    task: Task = configs.resolve(config.task, config=config)
    settings = dict(config.get("problem") or {})
    for name in settings:
        if name not in _SETTINGS:
            raise configs.ConfigError(
                f"--config.problem.{name}: unknown, choose among {', '.join(_SETTINGS)}"
                f"{configs.nearest(name, _SETTINGS)}"
            )
    problem: Problem = task.problem
    count = settings.get("microbatches", 1)
    for name, side in (("inner", task.inner), ("outer", task.outer)):
        if isinstance(count, int) and count > 0 and side.batch_size % count:
            raise configs.ConfigError(
                f"--config.problem.microbatches={count} does not divide the {name} batch size "
                f"{side.batch_size}"
            )
    try:
        problem = dataclasses.replace(problem, **settings)
    except ValueError as error:
        raise configs.ConfigError(f"--config.problem: {error}") from error
    return dataclasses.replace(task, problem=problem)


def make_solver(config: Any, task: Task) -> BilevelSolver:
    """The solver that `config.solver` describes, handed what it takes of problem and data."""
    first = np.array(0)
    return configs.resolve(
        config,
        problem=task.problem,
        num_inner_batches=task.inner.num_batches,
        num_outer_batches=task.outer.num_batches,
        inner_weights=task.inner.weights if task.inner.ragged else None,
        outer_weights=task.outer.weights if task.outer.ragged else None,
        example_batch=Batch(data.gather(task.inner, first), data.gather(task.outer, first)),
    )
