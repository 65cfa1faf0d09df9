"""What share of a run's time its steps take, and what takes the rest.

    python benchmarks/throughput.py [--steps 2000] [--model cnn]

The cleaning example with its own config, from the first line of the loop to its last step. The
compilation of the steps is apart; the programs of the evaluation and of the health probe are
compiled at their first call, which has a column of its own, and "later" are the shares without
those: in the loop, and of all with the check at the end, which is the summary's (`health.summary`)
and happens once. CPU time, of all threads, stands beside wall time: on a shared machine it is what
is left.
"""

from __future__ import annotations

import argparse
import collections
import functools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

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
    "check at the end": (Monitor, "last_check"),
    "first check": (Monitor, "first_check"),
    "saves": (actions.Saving, "__call__"),
    "last save": (actions.Saving, "finish"),
    "metrics": (actions.MetricLog, "write"),
    "means": (actions.StepMeans, "add"),
}


class Spent(NamedTuple):
    """Of one call."""

    wall: float
    cpu: float


def timed(spent: dict[str, list[Spent]]) -> None:
    """Makes every part say what each of its calls takes, without what parts in it take."""
    within = [Spent(0.0, 0.0)]
    for part, (owner, name) in PARTS.items():
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, part=part, original=original) -> Any:
            began = Spent(time.perf_counter(), time.process_time())
            within.append(Spent(0.0, 0.0))
            try:
                return original(*args)
            finally:
                taken = _less(Spent(time.perf_counter(), time.process_time()), began)
                spent[part].append(_less(taken, within.pop()))
                within[-1] = Spent(*(sum(pair) for pair in zip(within[-1], taken, strict=True)))

        setattr(owner, name, call)


def _less(whole: Spent, part: Spent) -> Spent:
    return Spent(whole.wall - part.wall, whole.cpu - part.cpu)


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
    spent: dict[str, list[Spent]] = collections.defaultdict(list)
    timed(spent)
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        trained = train_loop(run, Path(folder), task, solver)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    totals = trained.totals
    compiling, steps = totals["compile_seconds"], Spent(totals["seconds"], totals["cpu_seconds"])
    title = f"{args.model}, {run.steps} steps: {wall:.1f} s of wall time, {cpu:.1f} s of CPU, "
    title += f"{compiling:.1f} s of wall time to compile the steps"
    later = {part: sum(call.cpu for call in calls[1:]) for part, calls in spent.items()}
    later = {"steps": steps.cpu, **later}
    ending = "check at the end"
    once = sum(call.cpu for call in spent[ending])
    with Rows(args.markdown) as rows:
        for part, calls in {"steps": [steps], **spent}.items():
            seconds, of_cpu = (sum(column) for column in zip(*calls, strict=True))
            row = {"part": part, "calls": len(calls), "wall s": f"{seconds:.2f}"}
            row |= {"share": f"{seconds / (wall - compiling):.1%}", "CPU s": f"{of_cpu:.2f}"}
            row["the first, CPU s"] = f"{calls[0].cpu:.2f}" if part != "steps" else ""
            row["share of CPU later"] = f"{later[part] / sum(later.values()):.1%}"
            cost = once if part == ending else later[part]
            row["of all"] = f"{cost / (once + sum(later.values())):.1%}"
            rows.add(row, title)
        rest = (
            wall
            - compiling
            - sum(call.wall for calls in (*spent.values(), [steps]) for call in calls)
        )
        row = {"part": "rest: files, restoring, the first trace", "wall s": f"{rest:.2f}"}
        rows.add({**row, "share": f"{rest / (wall - compiling):.1%}"}, title)


if __name__ == "__main__":
    main()
