"""One run of `bf.auto` on MNIST hypercleaning, with any of its settings changed.

    python benchmarks/auto.py --data ../shared/data/mnist --model mlp --steps 2500 \
        --set learning_rate=1 update_every=2

prints one line of JSON: validation and test error, the AUC of finding wrong labels. DIR holds the
four original MNIST files. Choose settings by validation error only.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import roc_auc_score

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax import data
from examples.mnist_hypercleaning import task
from examples.mnist_hypercleaning.model import error, make_model

INNER = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adamw": lambda rate: optax.adamw(rate, weight_decay=1e-4),
}


def read_idx(path: Path) -> np.ndarray:
    """An array from one of the original files."""
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def run(options: argparse.Namespace) -> dict:
    """Trains once; returns what is printed."""
    images = read_idx(options.data / "train-images-idx3-ubyte.gz")[..., None]
    labels = read_idx(options.data / "train-labels-idx1-ubyte.gz").astype(np.int32)
    test_images = read_idx(options.data / "t10k-images-idx3-ubyte.gz")[..., None]
    test_labels = read_idx(options.data / "t10k-labels-idx1-ubyte.gz").astype(np.int32)
    order = np.random.default_rng(options.seed).permutation(len(labels))
    train, held = order[: options.train], order[options.train : options.train + options.held]
    given, wrong = data.corrupt_labels(labels[train], options.p, 10, options.seed, "symmetric")
    if options.fresh:
        test_images, test_labels = images[order[-10_000:]], labels[order[-10_000:]]
    x_train, x_held, x_test = data.standardize(images[train], images[held], test_images)

    model = make_model(options.model, 10)
    weights = bf.outer.sigmoid(len(train))
    problem = task.make_problem(model, weights, task.REGULARIZATION[options.model])
    inner = data.partition({"image": x_train, "label": given}, 64, seed=options.seed)
    outer = data.partition({"image": x_held, "label": labels[held]}, 64, seed=options.seed)
    rate = optax.linear_schedule(options.rate, 0.0, options.steps)
    settings = {k: json.loads(v) for k, v in (item.split("=") for item in options.set)}
    solver = bf.auto(
        problem,
        inner=INNER[options.inner](rate),
        steps=options.steps,
        inner_weights=inner.weights if inner.ragged else None,
        outer_weights=outer.weights if outer.ragged else None,
        **settings,
    )
    variables = dict(model.init(jax.random.PRNGKey(options.seed), x_train[:1], train=False))
    params = variables.pop("params")
    state = solver.init(
        params,
        weights.init(),
        model_state=variables if model.stateful else None,
        rng=jax.random.PRNGKey(options.seed + 1),
    )
    draws = np.random.default_rng(options.seed + 77)

    def ids(count):
        epochs = [draws.permutation(count) for _ in range(-(-options.steps // count))]
        return jnp.asarray(np.concatenate(epochs)[: options.steps], jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_all(state, inner_batches, outer_batches, picks):
        def body(state, pick):
            sides = [
                jax.tree.map(lambda leaf, i=i: leaf[i], batches)
                for i, batches in zip(pick, (inner_batches, outer_batches), strict=True)
            ]
            state, info = solver.update(state, bf.Batch(*sides, *pick))
            return state, (info.adjoint_residual, info.finite.adjoint)

        return jax.lax.scan(body, state, picks)

    began = time.perf_counter()
    batches = jax.tree.map(jnp.asarray, (inner.batches, outer.batches))
    picks = (ids(inner.num_batches), ids(outer.num_batches))
    state, (residual, finite) = train_all(state, *batches, picks)
    logits = np.asarray(state.outer_params)
    return {
        "model": options.model,
        "inner": f"{options.inner} {options.rate}",
        "p": options.p,
        "seed": options.seed,
        "steps": options.steps,
        "settings": settings,
        "gradient_units_per_step": solver.units,
        "validation_error": error(model, state, x_held, labels[held]),
        "fresh_error" if options.fresh else "test_error": error(model, state, x_test, test_labels),
        "wrong_label_auc": float(roc_auc_score(wrong, -logits)),
        "adjoint_residual": float(jnp.median(residual[-200:])),
        "finite": bool(finite.all()),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Reads the command line and prints the run's row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="mlp", choices=sorted(task.REGULARIZATION))
    parser.add_argument("--inner", default="adamw", choices=sorted(INNER))
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--held", type=int, default=5_000)
    parser.add_argument(
        "--fresh", action="store_true", help="10,000 unseen training images, not the test set"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    add_argument(parser)
    options = parser.parse_args()
    with Rows(options.markdown) as rows:
        rows.add(run(options))


if __name__ == "__main__":
    main()
