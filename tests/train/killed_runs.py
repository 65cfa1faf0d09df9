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
from bilevel_flax import cli  # noqa: F401

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
        # A job started in the background would ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = cli.main(["train", "--config", CONFIG, "--workdir", workdir, *overrides])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def signal_at(process: int, sent: signal.Signals, step: int, delay: float, workdir: Path) -> None:
    """Sends the signal, unless the process ends before its moment comes."""
    awaited = max(step, newest(workdir) + 1) if step >= 0 else -1
    while newest(workdir) < awaited:
        time.sleep(0.002)
        # Leaves its exit code to be asked for again.
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
    time.sleep(delay)
    os.kill(process, sent)


if __name__ == "__main__":
    for line in sys.stdin:
        folder, name, after, wait = line.split()
        pid = start(folder, sys.argv[1:], Path(folder + ".log"))
        if name != "-":
            signal_at(pid, signal.Signals[name], int(after), float(wait), Path(folder))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
