"""What a learned policy of augmentations reaches: planted invariances, MNIST, class-wise signals.

    python benchmarks/augmentation.py --manual-dir DATA/mnist --out runs/augmentation [--parts ...]

The task and the settings are those of `configs/augmentation.py`; the search and plain training are
compiled once for all seeds and policies of a part. Results are stored in `results.json` as they
come, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax import data
from bilevel_flax.outer.augmentation import Policy
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.train import config as configs
from bilevel_flax.train.setup import make_solver
from examples.augmentation import compared, images, signals, task
from examples.augmentation.model import make_model

CONFIG = Path(__file__).parent.parent / "configs" / "augmentation.py"
CHEAP = ["solver.update_every=4", "solver.adjoint_update_every=2"]
# Overrides, seeds, and what else is measured.
PARTS = {
    "rotate": (["planted=rotate", "model=mlp"], 3, "scan"),
    "shift": (["planted=shift", "model=mlp"], 3, "scan"),
    "mnist": (["model=cnn", "steps=2000", *CHEAP], 5, "compare"),
    "signals": (["data.name=signals", "per_class=True"], 3, "compare"),
}
SCANNED = {"rotate": ("rotate",), "shift": ("translate_x", "translate_y")}
GRID = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35)  # of the learned magnitude


@dataclasses.dataclass
class Part:
    """One part's compiled programs; seeds differ in the data that they are handed."""

    config: Any
    policy: Policy
    programs: tuple[Any, Any]  # the search, plain training
    solvers: tuple[bf.BilevelSolver, bf.BilevelSolver]
    measure: Any
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict)


def load(config):
    """The examples that a config asks for."""
    return (signals if config.data.name == task.SIGNALS else images).load(config)


def build(config) -> Part:
    """Compiles nothing yet; the first call does."""
    built = task.make_task(config)
    kind = "signals" if config.data.name == task.SIGNALS else "images"
    examples = load(config)
    weights = built.inner.weights if built.inner.ragged else None
    solver = make_solver(config.solver, built)
    plain = inner_only(
        built.problem, inner=configs.resolve(config.solver.inner), inner_weights=weights
    )

    def pick(batches, i):
        return jax.tree.map(lambda leaf: leaf[i], batches)

    def run(solver):
        @jax.jit
        def many(state, inner, outer, inner_ids, outer_ids):
            def step(state, ids):
                i, j = ids
                batch = bf.Batch(pick(inner, i), pick(outer, j), i, j)
                return solver.update(state, batch)[0], None

            return jax.lax.scan(step, state, (inner_ids, outer_ids))[0]

        return many

    return Part(
        config,
        task.make_policy(config, kind, examples.num_classes),
        (run(solver), run(plain)),
        (solver, plain),
        task.make_measure(
            make_model(config.model, kind, examples.num_classes), examples.mean, examples.deviation
        ),
    )


class Seed:
    """One seed of a part: its data, and runs of both programs on them."""

    def __init__(self, part: Part, seed: int):
        with part.config.unlocked():
            part.config.seed = seed
        self.part, self.examples = part, load(part.config)
        built = task.make_task(part.config, self.examples)
        rng, self.rng = jax.random.split(jax.random.PRNGKey(seed))
        self.start = built.init(rng)
        sides = (built.inner, built.outer)
        self.batches = tuple(jax.tree.map(jnp.asarray, side.batches) for side in sides)
        steps = part.config.steps
        self.ids = tuple(
            jnp.asarray(data.Sampler(side.num_batches, 2 * seed + n, 1).ids(0, steps).reshape(-1))
            for n, side in enumerate(sides)
        )

    def run(self, x=None) -> tuple[bf.TrainState, dict[str, float]]:
        """Searches (x None) or trains with x frozen; returns the state and what it reached."""
        solver = self.part.solvers[x is not None]
        start = self.start
        state = solver.init(
            start.inner_params,
            start.outer_params if x is None else jax.tree.map(jnp.asarray, x),
            model_state=start.model_state,
            rng=self.rng,
        )
        args = (state, *self.batches, *self.ids)
        name = "search" if x is None else "plain"
        if name not in self.part.compiled:
            self.part.compiled[name] = self.part.programs[x is not None].lower(*args).compile()
        compiled = self.part.compiled[name]
        began, cpu = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(compiled(*args))
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        error, loss = self.part.measure(state, self.examples.validation)
        measured = {"validation_error": error, "validation_loss": loss, **spent}
        measured["test_error"], measured["test_loss"] = self.part.measure(state, self.examples.test)
        return state, measured


def scan(seed: Seed, learned: Any, names: tuple[str, ...], save) -> None:
    """Scans h over the magnitudes of some operations, all else as learned."""
    policy = seed.part.policy
    values = policy.learned(learned)
    for factor in GRID:
        there = {
            name: dict(each, magnitude=each["magnitude"] * (factor if name in names else 1.0))
            for name, each in values.items()
        }
        for name in names:
            there[name]["magnitude"] = min(there[name]["magnitude"], policy.limit(name))
        save(f"scan {factor:g}", lambda there=there: seed.run(policy.at(there))[1])


def compare(seed: Seed, learned: Any, number: int, save) -> None:
    """Training with other policies frozen."""
    policy, config = seed.part.policy, seed.part.config
    others = {
        "learned": learned,
        "none": policy.at({}),
        "random": compared.shuffled(policy, learned, seed=5000 + number),
        **{f"uniform {m:g}": compared.uniform(policy, m) for m in config.uniform_magnitudes},
    }
    for name, x in others.items():
        save(name, lambda x=x: seed.run(x)[1])


def main() -> None:
    """Makes what is missing and prints what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manual-dir", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--seeds", type=int, help="fewer than the part's own")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, key=value")
    add_argument(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.parts:
        overrides, seeds, more = PARTS[name]
        where = [] if name == "signals" else ["data.name=mnist"]
        where += [] if name == "signals" else [f"data.manual_dir={options.manual_dir}"]
        where += [f"data.data_dir={options.data_dir}"] if options.data_dir else []
        part = None
        for number in range(options.seeds or seeds):
            own = results.setdefault(f"{name} {number}", {})

            def save(key, job, own=own, label=f"{name} {number}"):
                if key not in own:
                    own[key] = job()
                    path.write_text(json.dumps(results, indent=1))
                    shown = {k: v for k, v in own[key].items() if not isinstance(v, dict)}
                    print(label, key, {k: round(v, 4) for k, v in shown.items()}, flush=True)

            if part is None:
                config = configs.load(str(CONFIG), [*where, *overrides, *options.set])
                part = build(config)
            seed = Seed(part, number)

            def search(seed=seed, part=part):
                state, measured = seed.run()
                return measured | {"learned": part.policy.learned(state.outer_params)}

            save("search", search)
            learned = part.policy.at(own["search"]["learned"])
            if more == "scan":
                scan(seed, learned, SCANNED[name], save)
            else:
                compare(seed, learned, number, save)
    with Rows(options.markdown) as rows:
        report(results, rows)


def minimum(magnitudes: np.ndarray, values: np.ndarray) -> float:
    """Where a cubic through the values is lowest, within the grid."""
    fine = np.linspace(magnitudes[0], magnitudes[-1], 2001)
    return float(fine[np.polyval(np.polyfit(magnitudes, values, 3), fine).argmin()])


def report(results: dict[str, Any], rows: Rows) -> None:
    """The tables: what was learned, what a scan says of it, what other policies reach."""
    for key, own in results.items():
        name = key.split()[0]
        if not own.get("search"):
            continue
        learned = own["search"]["learned"]
        for operation, values in learned.items():
            pair = {k: np.round(values[k], 3).tolist() for k in ("magnitude", "probability")}
            rows.add({"run": key, "operation": operation, **pair}, "Learned")
        scanned = {k.split()[1]: v for k, v in own.items() if k.startswith("scan ")}
        if scanned:
            factors = np.array([float(k) for k in scanned])
            base = learned[SCANNED[name][0]]["magnitude"]
            best = minimum(factors, np.array([v["validation_loss"] for v in scanned.values()]))
            row = {"run": key, "learned": f"{base:.4g}", "best by scan": f"{best * base:.4g}"}
            row["learned / best"] = f"{1 / best:.3f}"
            losses = {f"h at {k}": f"{v['validation_loss']:.4f}" for k, v in scanned.items()}
            rows.add({**row, **losses}, "Scan of the magnitude")
        else:
            errors = {k: f"{100 * v['test_error']:.2f}" for k, v in own.items()}
            seconds = {k: f"{v['seconds']:.1f}" for k, v in own.items()}
            rows.add({"run": key, **errors}, f"{name}: test error, %")
            rows.add({"run": key, **seconds}, f"{name}: seconds")


if __name__ == "__main__":
    main()
