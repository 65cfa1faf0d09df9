"""MAML and first-order MAML beside implicit MAML: the same tasks, start, optimiser and steps.

Each update is measured alone: seconds, and the memory that XLA reserves for temporaries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_flax as bf
from bilevel_flax.train.step_runner import StepRunner
from examples.few_shot import model, omniglot, solvers
from examples.few_shot import task as tasks

HEADLINE = ("maml.test_accuracy", "first_order.test_accuracy")


def run(
    config: Any,
    pixels: jax.Array,
    train: omniglot.Tasks,
    test: omniglot.Tasks,
    start: Any,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Trains both and measures all updates.

    Args:
        config: the run's.
        pixels: of all drawings.
        train: the run's tasks.
        test: tasks of the meta-test alphabets.
        start: x at the run's start.
        log: prints a line.
    """
    outer = optax.adam(config.learning_rate)
    unrolled = {"inner_rate": config.unrolled_rate, "inner_steps": config.unrolled_steps}
    side = tasks.minibatches(train, config.batch_size, config.seed)
    zeros = lambda rows: jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape)), start)
    results: dict[str, Any] = {}
    for name in ("maml", "first_order"):
        problem = tasks.make_problem(model.apply, pixels, 0.0, name == "first_order")
        solver = solvers.maml(problem, outer=outer, **unrolled)
        state = solver.init(zeros(config.batch_size), start)
        results[name] = _cost(solver, state, side)
        loop, step = StepRunner(solver, side, side, seed=config.seed, paired=True), 0
        while step < config.steps:
            state, info = loop.run(state, step, config.steps)
            step += len(info.inner_loss)
        settings = (config.unrolled_rate, config.unrolled_steps)
        accuracy = tasks.adapted_accuracy(
            model.apply, pixels, state.outer_params, test, 0.0, settings
        )
        results[name]["test_accuracy"] = float(accuracy.mean())
        log(f"{name:12s} test accuracy {accuracy.mean():.2%}, {_line(results[name])}")
    problem = tasks.make_problem(model.apply, pixels, config.proximal)
    ours = {"outer": outer, "inner_rate": config.inner_rate}
    if config.recurring:
        solver, rows = solvers.tracked(problem, **ours), config.tasks
    else:
        ours |= {"inner_steps": config.inner_steps, "adjoint_steps": config.adjoint_steps}
        solver, rows = solvers.imaml(problem, **ours), config.batch_size
    results["ours"] = _cost(solver, solver.init(zeros(rows), start), side)
    log(f"{'ours':12s} {_line(results['ours'])}")
    return results


def _cost(solver: bf.BilevelSolver, state: bf.TrainState, side: Any) -> dict[str, Any]:
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), side.batches)
    update = jax.jit(solver.update).lower(state, bf.Batch(batch, batch)).compile()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(update(state, bf.Batch(batch, batch)))
        seconds.append(time.perf_counter() - began)
    memory: Any = update.memory_analysis()
    bytes_ = int(memory.temp_size_in_bytes)
    return {"seconds_per_step": min(seconds), "temporary_bytes": bytes_}


def _line(result: dict[str, Any]) -> str:
    seconds, memory = result["seconds_per_step"], result["temporary_bytes"]
    return f"{1e3 * seconds:.0f} ms a step, {memory / 1e6:.1f} MB temporaries"
