"""What a run reads from its config, checked."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bilevel_flax import config as configs
from bilevel_flax import data
from bilevel_flax.base import Batch, BilevelSolver
from bilevel_flax.task import Task

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
