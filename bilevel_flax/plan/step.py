"""The step that a config would run on a mesh, compiled from shapes alone: nothing is allocated."""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax import oracles, sharding
from bilevel_flax.base import Batch, BilevelSolver, Problem, TrainState
from bilevel_flax.data import FiniteSum
from bilevel_flax.oracles import flops as flop_count
from bilevel_flax.plan.collectives import Collective, instructions
from bilevel_flax.sharding.context import in_mesh
from bilevel_flax.train import config as configs
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.setup import make_solver, make_task
from bilevel_flax.train.task import Task

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Lowered(NamedTuple):
    """A step before it is compiled.

    Attributes:
        state: its shapes.
        shardings: where these lie.
        batch: shapes of one minibatch of each side.
        batch_shardings: where these lie.
        flops: of a step, on all chips together.
        gradient_flops: of one gradient of G on an inner minibatch, on all chips together.
        reduces_once: its gradients are; else XLA's partitioner places the reductions.
        program: for `compiled`.
    """

    state: TrainState
    shardings: TrainState
    batch: Batch
    batch_shardings: Batch
    flops: float
    gradient_flops: float
    reduces_once: bool
    program: Any


class Compiled(NamedTuple):
    """What the compiler says about one chip.

    Attributes:
        hbm_bytes_needed: all of it.
        argument_bytes: state and minibatch.
        temporary_bytes: activations, gathered parameters, directions; NaN where it did not fit.
        collectives: one by one.
        seconds: that compilation took.
        limit: of the compiler, where it refused for want of memory; its collectives are unknown.
    """

    hbm_bytes_needed: int
    argument_bytes: int
    temporary_bytes: float
    collectives: list[Collective]
    seconds: float
    limit: int | None = None


def lower(config: configs.Config, mesh: Any) -> Lowered:
    """Traces and lowers the step of a config on a mesh.

    Args:
        config: as for `train_and_evaluate`; it is not changed.
        mesh: from `sharding.make_mesh`, of devices that need not be there.

    Raises:
        ConfigError: as `train_and_evaluate`.
        ValueError: sizes that the mesh does not divide.
    """
    run = RunConfig.read(copy.deepcopy(config))
    task: Task = make_task(run)
    run = run.with_steps(task.inner.num_batches)
    problem = task.problem
    layout = sharding.Layout(mesh, run.rules or task.rules, problem)
    once = reduces_once(run, mesh)
    if once:
        problem = sharding.data_parallel(problem, mesh, layout.rules)
    elif mesh.size > 1:
        problem = in_mesh(sharding.whole(problem), mesh)
    solver = make_solver(run.solver, dataclasses.replace(task, problem=problem))

    state = jax.eval_shape(lambda rng: _start(task, solver, rng), jax.random.PRNGKey(0))
    batch = _minibatch(task, solver)
    shardings = layout.state(state)
    everywhere: Any = layout.everywhere
    batch_shardings = Batch(
        layout.batches(batch.inner, int(solver.batches[0] != 1), "the inner data "),
        layout.batches(batch.outer, int(solver.batches[1] != 1), "the outer data "),
        everywhere,
        everywhere,
    )
    step = jax.jit(
        solver.update,
        in_shardings=(shardings, batch_shardings),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    traced = step.trace(state, batch)
    return Lowered(
        state,
        shardings,
        batch,
        batch_shardings,
        flop_count.of(traced.jaxpr),
        _gradient_flops(task.problem, state, batch, solver.batches[0]),
        once,
        traced.lower(),
    )


def compiled(lowered: Lowered) -> Compiled:
    """Compiles; a step that does not fit is an answer, not an error.

    Raises:
        Exception: what the compiler says beside that it lacks memory.
    """
    began = time.perf_counter()
    arguments = sum(
        bytes_on_a_chip(leaf, sharding)
        for leaf, sharding in zip(
            jax.tree.leaves((lowered.state, lowered.batch)),
            jax.tree.leaves((lowered.shardings, lowered.batch_shardings)),
            strict=True,
        )
    )
    try:
        program = lowered.program.compile()
    except Exception as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - began
        return Compiled(needed[0], arguments, needed[0] - arguments, [], seconds, needed[1])
    memory = program.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Compiled(
        int(needed),
        int(memory.argument_size_in_bytes),
        float(memory.temp_size_in_bytes),
        instructions(program.as_text()),
        time.perf_counter() - began,
    )


def bytes_on_a_chip(leaf: Any, sharding: Any) -> int:
    """Bytes of a shape's part that one chip holds."""
    shape, dtype = leaf.shape, leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 16
    return int(np.prod(sharding.shard_shape(shape), dtype=np.int64)) * jnp.dtype(dtype).itemsize


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there) from what XLA says when a program does not fit a TPU.

    Both forms count the arguments in, whatever they call the sum.
    """
    size = r"([\d.]+)([KMGT])"
    forms = (
        rf"\({size}\) exceeds available HBM \({size}\)",
        rf"memory space hbm\. Used {size} of {size} hbm",
    )
    for form in forms:
        if match := re.search(form, message):
            used, used_unit, there, there_unit = match.groups()
            return int(float(used) * _UNITS[used_unit]), int(float(there) * _UNITS[there_unit])
    return None


def reduces_once(run: RunConfig, mesh: Any) -> bool:
    """Whether the step reduces once, as `make_layout` decides; that losses decompose is assumed."""
    return mesh.size > 1 and mesh.shape["tensor"] == 1 and run.reduction != "gspmd"


def _start(task: Task, solver: BilevelSolver, rng: Any) -> TrainState:
    start = task.start(rng)
    return solver.init(
        start.inner_params, start.outer_params, model_state=start.model_state, rng=rng
    )


def _minibatch(task: Task, solver: BilevelSolver) -> Batch:
    def side(finite_sum: FiniteSum, count: int) -> tuple[Any, Any]:
        leading = () if count == 1 else (count,)
        shape = lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape[1:]), leaf.dtype)
        return jax.tree.map(shape, finite_sum.batches), jax.ShapeDtypeStruct(leading, jnp.int32)

    inner, inner_id = side(task.inner, solver.batches[0])
    outer, outer_id = side(task.outer, solver.batches[1])
    return Batch(inner, outer, inner_id, outer_id)


def _gradient_flops(problem: Problem, state: TrainState, batch: Batch, count: int) -> float:
    inner = batch.inner
    if count != 1:
        inner = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inner)
    jaxpr = jax.make_jaxpr(
        lambda state, inner: oracles.inner_grad(
            problem,
            state.inner_params,
            state.outer_params,
            inner,
            state.model_state,
            state.rng if problem.stateful else None,
        )
    )(state, inner)
    return flop_count.of(jaxpr)
