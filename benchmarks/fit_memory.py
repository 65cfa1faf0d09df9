"""An exact step of a network with rematerialised blocks, beside plain training: time and memory.

    python benchmarks/fit_memory.py [--layers 6 12] [--batch 32] [--length 64] [--rounds 3]

A decoder whose blocks are rematerialised in a scan: a plain gradient; SOBA's oracles as one would
write them by hand (`jvp` of that gradient, and F's gradient), which is also what `bf.soba` does as
the problem is given; and what `bf.oracles.fit_memory` makes of it. Temporaries of the compiled
programs, operations as traced, and the best wall and CPU time of some rounds in turns.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from benchmarks.step_cost import ScannedTransformer
from bilevel_flax.oracles import flops


def make_problem(model: ScannedTransformer) -> bf.Problem:
    """One weight for all examples of G."""

    def loss(z, x, batch):
        logits = jnp.asarray(model.apply(z, batch))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch)
        return jax.nn.sigmoid(x) * jnp.mean(losses)

    return bf.Problem(loss, lambda z, x, batch: loss(z, 0.0 * x, batch))


def best(functions: dict[str, Callable[..., Any]], args: tuple, rounds: int) -> dict[str, tuple]:
    """(wall, CPU) seconds of each, the best of some rounds in turns."""
    times = {name: (float("inf"), float("inf")) for name in functions}
    for _ in range(rounds + 1):  # the first one warms up
        for name, function in functions.items():
            began, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(*args))
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            times[name] = min(times[name][0], wall), min(times[name][1], cpu)
    return times


def main() -> None:
    """Prints a table for each depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    add_argument(parser)
    args = parser.parse_args()
    with Rows(args.markdown) as rows:
        for layers in args.layers:
            measure(layers, args, rows)


def measure(layers: int, args: argparse.Namespace, rows: Rows) -> None:
    """The rows of one depth."""
    model = ScannedTransformer(layers=layers)
    tokens = jax.random.randint(jax.random.key(0), (args.batch, args.length), 0, 256)
    z = jax.jit(model.init)(jax.random.key(1), tokens)
    point = bf.Variables(z, jax.tree.map(jnp.ones_like, z), jnp.zeros(()))
    problem, batch = make_problem(model), bf.Batch(tokens, tokens)
    fit = bf.oracles.fit_memory(problem, point, batch)
    plain = lambda point, batch, problem=problem: jax.value_and_grad(problem.inner_loss)(
        point.inner, point.outer, batch.inner
    )
    functions = {
        "plain gradient": plain,
        "as given": functools.partial(bf.oracles.evaluate, problem),
        "fitted": functools.partial(bf.oracles.evaluate, fit.problem),
    }
    traced = {name: jax.jit(f).trace(point, batch) for name, f in functions.items()}
    compiled = {name: one.lower().compile() for name, one in traced.items()}
    times = best(compiled, (point, batch), args.rounds)
    title = f"{layers} layers; fitted: {fit.message}"
    first: tuple = ()
    for name, one in compiled.items():
        temporaries = getattr(one.memory_analysis(), "temp_size_in_bytes", 0)
        sizes = flops.of(traced[name].jaxpr), temporaries
        row = (*times[name], *sizes)
        first = first or row
        wall, cpu, work, memory = (value / of for value, of in zip(row, first, strict=True))
        found = {"": name, "MiB": f"{row[3] / 2**20:.1f}", "memory": f"{memory:.2f} x"}
        found |= {"operations": f"{work:.2f} x", "wall s": f"{row[0]:.3f}"}
        found |= {"wall": f"{wall:.2f} x", "CPU s": f"{row[1]:.3f}", "CPU": f"{cpu:.2f} x"}
        rows.add(found, title)


if __name__ == "__main__":
    main()
