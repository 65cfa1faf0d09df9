"""How large a step is as traced, lowered and compiled, and what compiling it takes.

    python benchmarks/compile_time.py [--network darts|cnn|lm] [--size full|tiny] [--markdown]

`darts` is the search of `configs/darts_cifar10.py` in bfloat16, whose compilation takes minutes of
CPU (`--float32`: as one would run it on a CPU); `cnn` is that of the cleaning example, `lm`
`configs/lm_pod.py:tiny`, both with AdamW. A step of `bf.auto`, then a plain one of the same
network. JAX's persistent cache is left out.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from benchmarks import cheap_steps
from benchmarks.gpu import SIZES, search
from benchmarks.rows import Rows, add_argument
from bilevel_flax import data, oracles
from bilevel_flax.oracles.jaxprs import sub_jaxprs
from bilevel_flax.train import config as configs
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.setup import make_task

Step = tuple[str, Callable[..., Any], tuple[Any, ...]]  # name, function, shapes of its arguments


def darts(size: str, dtype: str = "bfloat16") -> Iterator[Step]:
    """The search."""
    made = search(SIZES[size], dtype)
    state = jax.eval_shape(made.start)
    yield from _steps(made.problem, made.inner, made.solver, state, made.batch)


def cnn(size: str) -> Iterator[Step]:
    """The cleaning example's network with BatchNorm and dropout."""
    del size
    problem, z, model_state, arrays = cheap_steps.cleaning("cnn")
    batch = data.gather(data.partition(arrays, cheap_steps.BATCH), np.array(0))
    yield from _adamw(problem, z, jnp.zeros(cheap_steps.COUNT), model_state, batch)


def lm(size: str) -> Iterator[Step]:
    """The decoder and its domains' weights."""
    del size
    task = make_task(RunConfig.read(configs.load("configs/lm_pod.py:tiny")))
    start = jax.eval_shape(task.init, jax.random.key(0))
    variables = start.inner_params, start.outer_params
    batch = data.gather(task.inner, np.array(0))
    yield from _adamw(task.problem, *variables, start.model_state, batch)


def _adamw(problem: bf.Problem, z: Any, x: Any, model_state: Any, batch: Any) -> Iterator[Step]:
    inner = optax.adamw(1e-3)
    solver = bf.auto(problem, inner=inner, steps=10_000)

    def start(z, x, model_state):
        return solver.init(z, x, model_state=model_state)

    yield from _steps(problem, inner, solver, jax.eval_shape(start, z, x, model_state), batch)


def _steps(problem: bf.Problem, inner: Any, solver: Any, state: Any, batch: Any) -> Iterator[Step]:
    def plain(z, opt_state, x, batch, model_state, rng):
        (loss, aux), grad = oracles.inner_value_and_grad(problem, z, x, batch, model_state, rng)
        updates, opt_state = inner.update(grad, opt_state, z)
        return optax.apply_updates(z, updates), opt_state, loss, aux

    yield "bf.auto", solver.update, (state, bf.Batch(batch, batch))
    z, _, x = state.variables
    rng = state.rng if problem.stateful else None
    yield "plain", plain, (z, jax.eval_shape(inner.init, z), x, batch, state.model_state, rng)


def equations(jaxpr: Any) -> int:
    """Of a traced program, those of its loops' bodies once."""
    eqns = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return sum(1 + sum(map(equations, sub_jaxprs(eqn))) for eqn in eqns)


def main() -> None:
    """Prints a row for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    networks = {"darts": darts, "cnn": cnn, "lm": lm}
    parser.add_argument("--network", choices=networks, default="darts")
    parser.add_argument("--size", choices=SIZES, default="full", help="of darts")
    parser.add_argument("--float32", action="store_true", help="darts, as on a CPU")
    add_argument(parser)
    args = parser.parse_args()
    if args.float32:
        networks["darts"] = functools.partial(darts, dtype="float32")
    jax.config.update("jax_enable_compilation_cache", False)
    with Rows(args.markdown) as rows:
        for name, function, shapes in networks[args.network](args.size):
            began = time.process_time()
            traced = jax.jit(function, donate_argnums=0).trace(*shapes)
            lowered = traced.lower()
            before, wall = time.process_time(), time.perf_counter()
            compiled = lowered.compile()
            cpu, wall = time.process_time() - before, time.perf_counter() - wall
            text, program = lowered.as_text(), compiled.as_text() or ""
            rows.add(
                {
                    "network": args.network,
                    "step": name,
                    "equations as traced": equations(traced.jaxpr),
                    "convolutions": text.count("stablehlo.convolution("),
                    "lines of StableHLO": text.count("\n"),
                    "fusions after XLA's optimisation": program.count(" fusion("),
                    "tracing and lowering, CPU s": f"{before - began:.1f}",
                    "compilation, CPU s": f"{cpu:.1f}",
                    "wall s": f"{wall:.1f}",
                }
            )


if __name__ == "__main__":
    main()
