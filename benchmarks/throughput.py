"""What share of a run's wall time its steps take, and what takes the rest.

    python benchmarks/throughput.py [--steps 2000] [--model cnn]

The cleaning example with its own config, from the first line of the loop to its last step; the
seconds of compilation are apart, those of the evaluation's and the health probe's programs (which
are compiled at their first call) are in theirs.
"""

from __future__ import annotations

import argparse
import collections
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rows import Rows, add_argument
from bilevel_flax.train import actions
from bilevel_flax.train import config as configs
from bilevel_flax.train.health.monitor import Monitor
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.setup import make_solver, make_task
from bilevel_flax.train.train_loop import train_loop

PARTS = {
    "evaluation": (actions.Evaluation, "__call__"),
    "health": (Monitor, "__call__"),
    "first check": (Monitor, "first_check"),
    "saves": (actions.Saving, "__call__"),
    "last save": (actions.Saving, "finish"),
    "metrics": (actions.MetricLog, "write"),
    "means": (actions.StepMeans, "add"),
}


def timed(spent: dict[str, list[float]]) -> None:
    """Makes every part say what each of its calls takes."""
    for part, (owner, name) in PARTS.items():
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, part=part, original=original) -> Any:
            began = time.perf_counter()
            try:
                return original(*args)
            finally:
                spent[part].append(time.perf_counter() - began)

        setattr(owner, name, call)


def main() -> None:
    """Prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--model", default="cnn")
    add_argument(parser)
    args = parser.parse_args()
    config = configs.load("configs/mnist_hypercleaning.py")
    config.steps, config.model = args.steps, args.model
    run = RunConfig.read(config)
    task = make_task(run)
    run = run.with_steps(task.inner.num_batches)
    solver = make_solver(run.solver, task)
    spent: dict[str, list[float]] = collections.defaultdict(list)
    timed(spent)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trained = train_loop(run, Path(folder), task, solver)
        wall = time.perf_counter() - began
    totals = trained.totals
    loop = wall - totals["compile_seconds"]
    title = (
        f"{args.model}, {run.steps} steps: {wall:.1f} s, {wall - loop:.1f} s of them compilation"
    )
    parts = {"steps": [totals["seconds"]], **spent}
    parts["rest"] = [loop - sum(map(sum, parts.values()))]
    with Rows(args.markdown) as rows:
        for part, calls in parts.items():
            row = {"part": part, "s": f"{sum(calls):.2f}", "share": f"{sum(calls) / loop:.1%}"}
            first = f"{calls[0]:.2f}" if len(calls) > 1 else ""
            rows.add({**row, "calls": len(calls), "the first, s": first}, title)


if __name__ == "__main__":
    main()
