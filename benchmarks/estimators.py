"""Time of an iteration of each estimator against SOBA's, inside one compiled loop.

    python benchmarks/estimators.py [--tasks ijcnn1,cleaning] [--solvers saba,srba,...] [--rounds 7]

Synthetic data of the published sizes, on the device, minibatches of 64 as slices of it:

  ijcnn1     logistic regression, 22 features and 22 penalties, N = 782 and M = 1433 minibatches
  cleaning   784 x 10 linear model with 20,000 per-sample weights, N = 313 and M = 79

Goals for SABA / SOBA: ijcnn1 <= 1.35 on jax 0.12 and <= 4 on 0.10.2, cleaning <= 1.5. The rounds of
the solvers alternate, and the ratio is the median over rounds, so that a busy machine slows both.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax.solvers import table

BATCH = 64


def ijcnn1():
    """Hyperparameter selection: one penalty for each of 22 features."""
    n, m, p = 49_990, 91_701, 22

    def losses(logits, x, batch):
        return jax.nn.softplus(-batch["y"] * logits)

    def penalty(z, x):
        return 0.5 * jnp.sum(jnp.exp(x) * z**2)

    def draw(key, samples):
        inputs = jax.random.normal(key, (-(-samples // BATCH), BATCH, p))
        return {"x": inputs, "y": jnp.sign(inputs[..., 0])}

    keys = jax.random.split(jax.random.key(0))
    logits = lambda z, batch: batch["x"] @ z
    problem = bf.linear_problem(logits, losses, losses, inner_penalty=penalty)
    start = jnp.zeros(p), jnp.full(p, -2.0)
    return problem, draw(keys[0], n), draw(keys[1], m), start, (0.03, 0.03)


def cleaning():
    """Hypercleaning: a linear model and one weight for each of 20,000 examples."""
    n, m = 20_000, 5_000

    def entropies(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def draw(key, samples):
        num = -(-samples // BATCH)
        inputs = jax.random.normal(key, (num, BATCH, 784))
        labels = jax.random.randint(jax.random.fold_in(key, 1), (num, BATCH), 0, 10)
        index = jnp.arange(num * BATCH, dtype=jnp.int32).reshape(num, BATCH)
        mask = (index < samples).astype(jnp.float32)
        return {"x": inputs, "y": labels, "index": index, "mask": mask}

    keys = jax.random.split(jax.random.key(0))
    problem = bf.linear_problem(
        lambda z, batch: batch["x"] @ z,
        lambda logits, x, batch: jax.nn.sigmoid(x) * entropies(logits, batch),
        lambda logits, x, batch: entropies(logits, batch),
        inner_penalty=lambda z, x: 0.2 * jnp.sum(z**2),
        per_sample=True,
    )
    start = jnp.zeros((784, 10)), jnp.full(n, -2.0)
    return problem, draw(keys[0], n), draw(keys[1], m), start, (1e-3, 1.0)


TASKS = {"ijcnn1": ijcnn1, "cleaning": cleaning}


def make(name, problem, inner, outer, steps):
    """The solver of that name with plain SGD; `saba-compact` memorises residuals."""
    num_inner, num_outer = (len(jax.tree.leaves(side)[0]) for side in (inner, outer))
    optimisers = {"inner": optax.sgd(steps[0]), "outer": optax.sgd(steps[1])}
    counts = {"num_inner_batches": num_inner, "num_outer_batches": num_outer}
    extra = {
        "saba": counts,
        "saba-compact": counts
        | {"memory": "compact", "example_batch": bf.Batch(row(inner, 0), row(outer, 0))},
        "srba": counts | {"period": num_inner},
        "spaba": counts | {"probability": 1 / num_inner},
    }
    method = table.method(name.partition("-")[0])
    return method(problem, **optimisers, **extra.get(name, {}))


def megabytes(tree):
    """Of all leaves together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e6


def row(tree, k):
    """Minibatch k, a slice."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, k, 0, keepdims=False), tree)


def compiled(solver, inner, outer, length):
    """`length` updates in one scan, the minibatches drawn on the device."""
    num_inner, num_outer = (len(jax.tree.leaves(side)[0]) for side in (inner, outer))

    def run(state, inner, outer):
        def body(state, key):
            i, j = jax.random.randint(key, (2,), 0, jnp.array([num_inner, num_outer]))
            batch = bf.Batch(row(inner, i), row(outer, j), i, j)
            return solver.update(state, batch)[0], None

        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), state.step), length)
        return jax.lax.scan(body, state, keys)[0]

    return run


def first_pass(solver, state, inner, outer):
    """The full pass that is due before the first step, if one is."""
    if int(solver.next_refresh(state)) > 0:
        return state
    refresh = jax.jit(solver.refresh, donate_argnums=0)
    for i in range(len(jax.tree.leaves(inner)[0])):
        part = jax.tree.map(lambda leaf, i=i: leaf[i], inner)
        state = refresh(state, bf.Batch(inner=part, inner_id=jnp.int32(i)))
    for j in range(len(jax.tree.leaves(outer)[0])):
        part = jax.tree.map(lambda leaf, j=j: leaf[j], outer)
        state = refresh(state, bf.Batch(outer=part, outer_id=jnp.int32(j)))
    return state


def measure(task, names, rounds, length, rows):
    """A row for each solver; SOBA is the first."""
    problem, inner, outer, start, steps = TASKS[task]()
    runs = {}
    for name in names:
        solver = make(name, problem, inner, outer, steps)
        state = first_pass(solver, solver.init(*start), inner, outer)
        run = compiled(solver, inner, outer, length)
        step = jax.jit(run, donate_argnums=0).lower(state, inner, outer).compile()
        temp = step.memory_analysis().temp_size_in_bytes
        state = jax.block_until_ready(step(state, inner, outer))
        runs[name] = [step, state, temp, []]
    for _ in range(rounds):
        for run in runs.values():
            before = time.perf_counter()
            run[1] = jax.block_until_ready(run[0](run[1], inner, outer))
            run[3].append((time.perf_counter() - before) / length * 1e6)
    base = runs["soba"][3]
    for name, (_, state, temp, times) in runs.items():
        best, middle = min(times), statistics.median(times)
        assert bool(jnp.isfinite(state.step)) and int(state.step) == length * (rounds + 1), name
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        row = {"task": task, "solver": name, "µs (min)": f"{best:.1f}"}
        row |= {"µs (median)": f"{middle:.1f}", "/ soba": f"{ratio:.2f}"}
        row["temporary MB"] = f"{temp / 1e6:.3f}"
        rows.add({**row, "memory MB": f"{megabytes(state.estimator_state):.3f}"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="ijcnn1,cleaning")
    parser.add_argument("--solvers", default="saba,saba-compact,srba,spaba,masoba,storm,fsla")
    parser.add_argument("--rounds", type=int, default=7)
    add_argument(parser)
    args = parser.parse_args()
    with Rows(args.markdown) as rows:
        for task in args.tasks.split(","):
            length = {"ijcnn1": 5000, "cleaning": 500}[task]
            measure(task, ["soba", *args.solvers.split(",")], args.rounds, length, rows)


if __name__ == "__main__":
    main()
