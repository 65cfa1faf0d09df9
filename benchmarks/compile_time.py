"""How large DARTS's search step is as traced, lowered and compiled, and what compiling it takes.

    python benchmarks/compile_time.py [--size full|tiny] [--markdown]

`full` is the network of `configs/darts_cifar10.py` in bfloat16 under `bf.auto`; its compilation
takes minutes of two CPU cores. JAX's persistent cache is left out.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax

import bilevel_flax as bf
from benchmarks.gpu import SIZES, search
from benchmarks.rows import Rows, add_argument
from bilevel_flax.oracles.jaxprs import sub_jaxprs


def equations(jaxpr: Any) -> int:
    """Of a traced program, those of its loops' bodies once."""
    eqns = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return sum(1 + sum(map(equations, sub_jaxprs(eqn))) for eqn in eqns)


def main() -> None:
    """Prints a row for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    add_argument(parser)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    made = search(SIZES[args.size])
    state, batch = jax.eval_shape(made.start), bf.Batch(made.batch, made.batch)
    traced = jax.jit(made.solver.update, donate_argnums=0).trace(state, batch)
    lowered = traced.lower()
    began, cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    text, program = lowered.as_text(), compiled.as_text() or ""
    with Rows(args.markdown) as rows:
        for name, value in {
            "equations of the traced step": equations(traced.jaxpr),
            "convolutions in the lowered program": text.count("stablehlo.convolution("),
            "lines of StableHLO": text.count("\n"),
            "fusions after XLA's optimisation": program.count(" fusion("),
            "CPU seconds of compilation": f"{cpu:.1f}",
            "wall seconds of compilation": f"{wall:.1f}",
        }.items():
            rows.add({"": name, "found": value})


if __name__ == "__main__":
    main()
