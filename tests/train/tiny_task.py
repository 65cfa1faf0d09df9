"""A run of less than a second: one number each for z, v and x; its optimisers can be poisoned."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.train.task import InitialValues, Task


def get_config(**changes: Any) -> ml_collections.ConfigDict:
    """Twenty steps; the keys that are not among `changes` have the defaults of `RunConfig`."""
    sgd = {"call": "optax:sgd", "learning_rate": 0.1}
    settings = {
        "steps": 20,
        "log_every": 5,
        "eval_every": 5,
        "checkpoint": {"every": 5},
        "health": {"every": 0, "summary": False},
        "task": {"call": "tiny_task:make_task"},
        "solver": {"call": "bilevel_flax:soba", "inner": sgd, "outer": sgd},
    }
    return ml_collections.ConfigDict(settings | changes)


def make_task(config: Any) -> Task:
    """G = mean (z - x - y)² / 2, F = mean (z - y)² / 2."""
    parts = data.partition({"y": np.linspace(0, 1, 8, dtype=np.float32)}, 2, seed=config.seed)
    half = lambda residual: jnp.mean(residual**2) / 2
    return Task(
        problem=bf.Problem(
            lambda z, x, batch: half(z - x - batch["y"]), lambda z, x, batch: half(z - batch["y"])
        ),
        init=lambda rng: InitialValues(jnp.zeros(()), jnp.zeros(())),
        inner=parts,
        outer=parts,
        evaluate=lambda state: {"distance": float(jnp.abs(state.inner_params - 0.5))},
        best_metric="distance",
        headline=("final",),
        final_metrics=final_metrics,
    )


def make_task_with_a_stopped_target(config: Any) -> Task:
    """The same with a target in G that depends on z and is held still: its gradient is none."""
    task = make_task(config)

    def inner_loss(z, x, batch):
        target = 0.5 * jax.lax.stop_gradient(z) + x
        return jnp.mean((z - target - batch["y"]) ** 2) / 2

    return dataclasses.replace(task, problem=bf.Problem(inner_loss, task.problem.outer_loss))


def make_task_with_a_kernel(config: Any) -> Task:
    """The same with a square that nothing can differentiate twice."""
    task = make_task(config)

    @jax.custom_vjp
    def square(residual):
        return jax.pure_callback(np.square, residual, residual)

    hide = lambda residual: jax.pure_callback(np.asarray, residual, residual)
    square.defvjp(lambda r: (square(r), r), lambda r, c: (2 * hide(r) * c,))

    def inner_loss(z, x, batch):
        return jnp.mean(square(z - x - batch["y"])) / 2

    return dataclasses.replace(task, problem=bf.Problem(inner_loss, task.problem.outer_loss))


def final_metrics(state: bf.TrainState, workdir: Path, log: Any) -> dict[str, float]:
    """One number."""
    del workdir
    log("final metrics of the tiny task")
    return {"final": float(state.inner_params)}


class PoisonState(NamedTuple):
    """How often it was called, and a number that nothing reads."""

    count: jax.Array
    moment: jax.Array


def poisoned_sgd(at: int, part: str = "updates") -> optax.GradientTransformation:
    """SGD whose update, or whose state, is NaN from call `at` on, though the gradient is finite."""

    def update(gradient, state, params=None):
        del params
        bad = jnp.where(state.count >= at, jnp.nan, 1.0)
        factor = bad if part == "updates" else 1.0
        moment = bad if part == "state" else state.moment
        updates = jax.tree.map(lambda leaf: -0.1 * factor * leaf, gradient)
        return updates, PoisonState(state.count + 1, moment)

    return optax.GradientTransformation(
        lambda params: PoisonState(jnp.int32(0), jnp.float32(jnp.inf if part == "inf" else 0.0)),
        update,
    )


def slow_task(config: Any) -> Task:
    """The same, with final metrics that take a while."""

    def slowly(state: bf.TrainState, workdir: Path, log: Any) -> dict[str, float]:
        log("baseline 1/1")
        time.sleep(0.4)
        return final_metrics(state, workdir, lambda line: None)

    return dataclasses.replace(make_task(config), final_metrics=slowly)
