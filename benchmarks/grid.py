"""`bf.auto` as it is against SOBA with a grid of 24 pairs of steps, on MNIST hypercleaning.

    python benchmarks/grid.py --data DATA/mnist --model linear --inner sgd --out runs/grid.csv

One line of the CSV for each run: 4 inner rates (0.3 to 10 times the usual one) times 6 outer rates
of Adam, all 24 in one program, and `bf.auto` with the 4 inner rates, one by one. Every run keeps
the network where its validation error was lowest, and the pair is chosen by that error too: test
errors are compared, never chosen by. Cases that the CSV holds are not run again.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from auto import INNER, read_idx
from sklearn.metrics import roc_auc_score

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax import data
from examples.mnist_hypercleaning import task
from examples.mnist_hypercleaning.model import make_model
from examples.mnist_hypercleaning.rates import inner_peak

INNER_FACTORS = (0.3, 1.0, 3.0, 10.0)
PAIRS = tuple(itertools.product(INNER_FACTORS, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)))
STEPS = {"linear": 8000, "mlp": 2500, "cnn": 3000}
CASE = ("model", "inner", "size", "p", "seed", "steps")
FOUND = (
    "method",
    "inner_rate",
    "outer_rate",
    "validation_error",
    "test_error",
    "wrong_label_auc",
    "seconds",
)
_LOOKS = 5  # evaluations in a run


def load(folder: Path, size: int, p: float, seed: int) -> dict[str, Any]:
    """20,000 / 5,000 / 10,000 images, float [n, size, size, 1], and labels; `size` 28 or 14."""
    images = read_idx(folder / "train-images-idx3-ubyte.gz")[..., None]
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz").astype(np.int32)
    test = read_idx(folder / "t10k-images-idx3-ubyte.gz")[..., None]
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz").astype(np.int32)
    if size == 14:
        images, test = (a.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)) for a in (images, test))
    order = np.random.default_rng(seed).permutation(len(labels))
    train, held = order[:20_000], order[20_000:25_000]
    given, wrong = data.corrupt_labels(labels[train], p, 10, seed, "symmetric")
    x_train, x_held, x_test = data.standardize(images[train], images[held], test)
    return {
        "train": {"image": x_train, "label": given},
        "held": {"image": x_held, "label": labels[held]},
        "test": {"image": x_test, "label": test_labels},
        "wrong": wrong,
    }


def run(options: argparse.Namespace, p: float, seed: int) -> list[dict[str, Any]]:
    """The 24 pairs and `bf.auto` on one split."""
    sets = load(options.data, options.size, p, seed)
    model = make_model(options.model, 10)
    weights = bf.outer.sigmoid(len(sets["wrong"]))
    problem = task.make_problem(model, weights, task.REGULARIZATION[options.model])
    inner = data.partition(sets["train"], 64, seed=seed)
    outer = data.partition(sets["held"], 64, seed=seed)
    ragged = {
        "inner_weights": inner.weights if inner.ragged else None,
        "outer_weights": outer.weights if outer.ragged else None,
    }
    steps, usual = options.steps or STEPS[options.model], inner_peak(options.inner, options.model)
    variables = dict(model.init(jax.random.PRNGKey(seed), sets["held"]["image"][:1], train=False))
    params = variables.pop("params")
    statistics = variables if model.stateful else None
    draws = np.random.default_rng(seed + 77)

    def ids(count):
        epochs = [draws.permutation(count) for _ in range(-(-steps // count))]
        return np.concatenate(epochs)[:steps].astype(np.int32)

    picks = np.stack([ids(inner.num_batches), ids(outer.num_batches)], 1)
    batches = jax.tree.map(jnp.asarray, (inner.batches, outer.batches))
    held, test = (jax.tree.map(jnp.asarray, sets[name]) for name in ("held", "test"))

    def soba(pair):
        rate = optax.linear_schedule(1.0, 0.0, steps)
        return bf.soba(
            problem,
            inner=INNER[options.inner](lambda count: usual * pair[0] * rate(count)),
            outer=optax.adam(lambda count: pair[1] * rate(count)),
            **ragged,
        )

    def auto(factor):
        rate = optax.linear_schedule(1.0, 0.0, steps)
        inner = INNER[options.inner](lambda count: usual * factor * rate(count))
        return bf.auto(problem, inner=inner, steps=steps, **ragged)

    def error(network, examples):
        params, state = network
        logits = model.apply({"params": params, **(state or {})}, examples["image"], train=False)
        return (logits.argmax(-1) != examples["label"]).mean()

    def train(make, pairs):
        def start(pair):
            state = make(pair).init(
                params, weights.init(), model_state=statistics, rng=jax.random.PRNGKey(seed + 1)
            )
            return state, jnp.inf, (state.inner_params, state.model_state)

        def some(pair, state, lowest, best, ids):
            def body(state, pick):
                one, two = (
                    jax.tree.map(lambda leaf, i=i: leaf[i], side)
                    for i, side in zip(pick, batches, strict=True)
                )
                return make(pair).update(state, bf.Batch(one, two, *pick))[0], None

            state, _ = jax.lax.scan(body, state, ids)
            now = (state.inner_params, state.model_state)
            reached = error(now, held)
            finite = jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(now)]))
            better = finite & (reached < lowest)
            best = jax.tree.map(functools.partial(jnp.where, better), now, best)
            return state, jnp.where(better, reached, lowest), best

        began = time.perf_counter()
        carry = jax.jit(jax.vmap(start))(pairs)
        step = jax.jit(jax.vmap(some, in_axes=(0, 0, 0, 0, None)), donate_argnums=(1, 2, 3))
        for part in np.split(picks[: steps - steps % _LOOKS], _LOOKS):
            carry = step(pairs, *carry, part)
        state, lowest, best = carry
        tested = jax.jit(lambda nets: jax.lax.map(lambda net: error(net, test), nets))(best)
        aucs = [
            roc_auc_score(sets["wrong"], -x) if np.isfinite(x).all() else np.nan
            for x in np.asarray(state.outer_params)
        ]
        seconds = [time.perf_counter() - began] * len(aucs)
        return zip(lowest.tolist(), tested.tolist(), aucs, seconds, strict=True)

    case = (options.model, options.inner, options.size, p, seed, steps)
    lines = [
        (*case, "soba", usual * rho, rate, *values)
        for (rho, rate), values in zip(PAIRS, train(soba, jnp.array(PAIRS)), strict=True)
    ]
    for rho in INNER_FACTORS:  # one by one: `bf.auto` asks z's optimiser, whose rate is a number
        ((*values,),) = train(lambda _, rho=rho: auto(rho), jnp.zeros((1, 1)))
        lines.append((*case, "auto", usual * rho, "", *values))
    return [dict(zip(CASE + FOUND, row, strict=True)) for row in lines]


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with the lowest validation error."""
    return min(rows, key=lambda row: float(row["validation_error"]))


def main() -> None:
    """Reads the command line, runs what is missing and prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(STEPS), default="linear")
    parser.add_argument("--inner", choices=sorted(INNER), default="sgd")
    parser.add_argument("--size", type=int, choices=(14, 28), default=28)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--p", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True)
    add_argument(parser)
    options = parser.parse_args()
    with Rows(options.markdown) as table:
        for p, seed in itertools.product(options.p, options.seeds):
            for row in chosen(options, p, seed):
                measured = {name: f"{float(row[name]):.4f}" for name in FOUND[3:]}
                table.add({**{name: row[name] for name in CASE + FOUND}, **measured})


def chosen(options: argparse.Namespace, p: float, seed: int) -> list[dict[str, Any]]:
    """The grid's best row, and of `bf.auto` those with the usual inner rate and with the best."""
    rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    case = (options.model, options.inner, str(options.size), str(p), str(seed))
    mine = [row for row in rows if tuple(row[name] for name in CASE[:5]) == case]
    if not mine:
        fresh = not options.out.exists()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        mine = run(options, p, seed)
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, CASE + FOUND)
            if fresh:
                writer.writeheader()
            writer.writerows(mine)

    peak = inner_peak(options.inner, options.model)
    autos = [row for row in mine if row["method"] == "auto"]
    usual = [row for row in autos if float(row["inner_rate"]) == peak]
    grid = [row for row in mine if row["method"] == "soba"]
    return [best(grid), *usual, best(autos)]


if __name__ == "__main__":
    main()
