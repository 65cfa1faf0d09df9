"""A program for kill -9: reads `workdir signal step delay` lines and runs, signals, reports.

Each line forks a process that trains in `workdir` by the command line, and sends it the signal
`delay` seconds after it has saved a checkpoint of `step` or later (-1: after its start); `-` lets
it end by itself. The answer
is its exit code, negative for a signal. Forking spares importing everything anew, which takes
seconds; no jax backend and no threads run in the parent.
"""

import os
import signal
import sys
import time
from pathlib import Path

# Imported before the forks.
import examples.mnist_hypercleaning.task  # noqa: F401
from bilevel_flax import cli, train  # noqa: F401

CONFIG = "configs/mnist_hypercleaning.py:soba"


def newest(workdir: Path) -> int:
    """The newest step that has a checkpoint, -1 without any."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def start(workdir: str, overrides: list[str], log: Path) -> int:
    """Starts a child that trains, with its output in a file; returns its process id."""
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = cli.main(["train", "--config", CONFIG, "--workdir", workdir, *overrides])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        folder, name, step, delay = line.split()
        awaited = max(int(step), newest(Path(folder)) + 1) if int(step) >= 0 else -1
        process = start(folder, sys.argv[1:], Path(folder + ".log"))
        if name != "-":
            while newest(Path(folder)) < awaited:
                time.sleep(0.002)
                if os.waitpid(process, os.WNOHANG)[0]:
                    sys.exit(f"{folder} ended before step {step}")
            time.sleep(float(delay))
            os.kill(process, getattr(signal, name))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
