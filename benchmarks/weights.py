"""One weight for each of 1e4 ... 1e8 training examples: time of a step and resident memory.

    python benchmarks/weights.py --sizes 1e4,1e6,1e8 --optimiser lazy_adam

The network is 784-256-10, the minibatches have 128 + 128 examples whose positions are drawn
uniformly from all n; the inputs are the same for every n. For time the sizes take turns in one
process. Memory is measured in a process for each size: what it grows by, against the sizes of the
arrays that must be there: the table of weights, its moments, the counts of visits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax.outer import lazy_adam, lazy_sgd

BATCH, CHUNK = 128, 50
OPTIMISERS = {"lazy_adam": lazy_adam(0.1), "lazy_sgd": lazy_sgd(0.1)}


def losses(z, batch):
    """Cross-entropies [batch] of the MLP."""
    hidden = jax.nn.relu(batch["inputs"] @ z["first"] + z["bias"][None, :])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ z["second"], batch["label"])


def make_solver(kind: str, optimiser: str) -> bf.BilevelSolver:
    """SOBA or SABA (of 2 minibatches: the partition's size is not the matter here)."""
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(jax.nn.sigmoid(x) * losses(z, batch)),
        lambda z, x, batch: jnp.mean(losses(z, batch)),
        per_sample=True,
    )
    rates = {"inner": optax.sgd(0.01), "outer": OPTIMISERS[optimiser]}
    if kind == "saba":
        return bf.saba(problem, **rates, num_inner_batches=2, num_outer_batches=2)
    return bf.soba(problem, **rates)


def start(num_rows: int):
    """(z, x)."""
    first, second = jax.random.split(jax.random.key(0))
    z = {
        "first": jax.random.normal(first, (784, 256)) / 28,
        "bias": jnp.zeros(256),
        "second": jax.random.normal(second, (256, 10)) / 16,
    }
    return z, jnp.zeros(num_rows)


def minibatches(rng: np.random.Generator):
    """Inputs and labels of a chunk of steps; the rows are drawn apart, anew for every round."""
    return {
        "inputs": rng.normal(size=(CHUNK, BATCH, 784)).astype(np.float32),
        "label": rng.integers(0, 10, size=(CHUNK, BATCH)).astype(np.int32),
    }


def rows_of(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Positions int32 [steps, batch], uniform over all n."""
    return rng.integers(0, num_rows, size=(CHUNK, BATCH), dtype=np.int32)


def compiled_chunk(solver: bf.BilevelSolver, state, chunk) -> Any:
    """CHUNK steps as one donated function, compiled for the shapes of `state` and `chunk`."""

    def steps(state, chunk, index):
        def one(state, taken):
            batch, index, i = taken
            batch = {**batch, "index": index}
            return solver.update(state, bf.Batch(batch, batch, i, i))[0], None

        return jax.lax.scan(one, state, (chunk, index, jnp.arange(CHUNK) % 2))[0]

    index = jax.ShapeDtypeStruct((CHUNK, BATCH), jnp.int32)
    return jax.jit(steps, donate_argnums=0).lower(state, chunk, index).compile()


def init(solver: bf.BilevelSolver, z, x):
    """A fresh state that takes over x's memory."""
    return jax.jit(solver.init, donate_argnums=1)(z, x)


def in_memory(peak: bool = False) -> int:
    """Bytes of this process in memory: now, or at most so far."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table_bytes(state) -> int:
    """Of the weights, their moments and the counts of visits."""
    leaves = jax.tree.leaves((state.outer_params, state.outer_opt_state))
    return sum(leaf.nbytes for leaf in leaves if leaf.ndim)


def memory(num_rows: int, kind: str, optimiser: str) -> dict[str, float]:
    """Bytes of one size, in this process."""
    rng = np.random.default_rng(0)
    solver = make_solver(kind, optimiser)
    chunk = jax.device_put(minibatches(rng))
    # What compiling and running take at any n comes first.
    small = init(solver, *start(1000))
    compiled_chunk(solver, small, chunk)(small, chunk, rows_of(1000, rng))
    z, x = jax.block_until_ready(start(num_rows))
    before = in_memory()
    state = jax.block_until_ready(init(solver, z, x))
    run = compiled_chunk(solver, state, chunk)
    for _ in range(4):
        state = jax.block_until_ready(run(state, chunk, rows_of(num_rows, rng)))
    given = 4 * num_rows  # x was there before
    return {
        "needed": table_bytes(state),
        "resident": in_memory() - before + given,
        "peak": in_memory(peak=True) - before + given,
        "temporary": run.memory_analysis().temp_size_in_bytes,
    }


def times(sizes: list[int], kind: str, optimiser: str, rounds: int) -> dict[int, np.ndarray]:
    """Seconds [rounds, 2] of a step for each size, wall and CPU; the sizes take turns."""
    rng = np.random.default_rng(0)
    solver = make_solver(kind, optimiser)
    chunk = jax.device_put(minibatches(rng))
    states = {size: init(solver, *start(size)) for size in sizes}
    runs = {size: compiled_chunk(solver, state, chunk) for size, state in states.items()}
    taken = {size: [] for size in sizes}
    for number in range(rounds + 2):
        for size in sizes:
            index = jax.device_put(rows_of(size, rng))
            begun = np.array([time.perf_counter(), time.process_time()])
            states[size] = jax.block_until_ready(runs[size](states[size], chunk, index))
            if number >= 2:
                now = np.array([time.perf_counter(), time.process_time()])
                taken[size].append((now - begun) / CHUNK)
    return {size: np.array(values) for size, values in taken.items()}


def main() -> None:
    """Prints one line for each size."""
    parser = argparse.ArgumentParser(description="Step time and memory for many weights.")
    parser.add_argument("--sizes", default="1e4,1e5,1e6,1e7,1e8")
    parser.add_argument("--solver", choices=("soba", "saba"), default="soba")
    parser.add_argument("--optimiser", choices=list(OPTIMISERS), default="lazy_adam")
    parser.add_argument("--rounds", type=int, default=20, help=f"of {CHUNK} steps")
    parser.add_argument("--memory-of", type=int, help="print the memory of one size as JSON")
    add_argument(parser)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, args.solver, args.optimiser)))
        return
    sizes = [int(float(text)) for text in args.sizes.split(",")]
    with Rows(args.markdown) as rows:
        compare(sizes, args, rows)


def compare(sizes: list[int], args: argparse.Namespace, rows: Rows) -> None:
    """A row of each table for each size."""
    what = f"{args.solver}, {args.optimiser}, 784-256-10, batch {BATCH}"
    for size in sizes:
        command = [sys.executable, __file__, "--memory-of", str(size), "--solver", args.solver]
        command += ["--optimiser", args.optimiser]
        results = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        needed = results["needed"]
        row: dict[str, Any] = {"n": f"{size:.0e}", "table, moments, counts MB": needed / 1e6}
        row |= {f"{name} MB": results[name] / 1e6 for name in ("resident", "peak", "temporary")}
        row = {name: v if name == "n" else f"{v:.2f}" for name, v in row.items()}
        row["resident / needed"] = f"{results['resident'] / needed:.3f}"
        rows.add(row, f"Memory: {what}")
    results = times(sizes, args.solver, args.optimiser, args.rounds)
    for size, values in results.items():
        ratio = np.median(values / results[sizes[0]], axis=0)
        (wall, cpu), least = 1e6 * np.median(values, axis=0), 1e6 * values[:, 0].min()
        row = {"n": f"{size:.0e}", "wall µs": f"{wall:.0f}", "least": f"{least:.0f}"}
        row |= {"CPU µs": f"{cpu:.0f}", f"wall / n = {sizes[0]:.0e}": f"{ratio[0]:.3f}"}
        rows.add({**row, f"CPU / n = {sizes[0]:.0e}": f"{ratio[1]:.3f}"}, f"A step: {what}")


if __name__ == "__main__":
    main()
