"""A program for kill -9: reads `workdir signal step delay` lines and runs, signals, reports.

Each line forks a process that trains in `workdir` by the command line, and sends it the signal
`delay` seconds after it has saved a checkpoint of `step` or later (-1: after its start); `-` lets
it end by itself. The answer is its exit code, negative for a signal. Forking spares importing
everything anew, which takes seconds; no jax backend and no threads run in the parent.
"""

import mmap
import os
import signal
import sys
import time
from pathlib import Path

# Imported before the forks.
import grain  # noqa: F401
import orbax.checkpoint  # noqa: F401

import bilevel_flax.train.experiment  # noqa: F401
import tests.faults.small_run  # noqa: F401
from bilevel_flax import cli
from bilevel_flax.train import train_loop
from bilevel_flax.train.step_runner import StepRunner

CONFIG = "tests/faults/small_run.py:srba"
LATE = 500  # of the 600 steps that the runs have
SENT = mmap.mmap(-1, 1)  # shared with the children: whether the signal is on its way


def newest(workdir: Path) -> int:
    """The newest step that has a checkpoint, -1 without any."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def hold(workdir: Path, awaited: int) -> None:
    """Keeps a run from its end until the signal has been sent, however busy the machine is."""
    run = StepRunner.run

    def held(*args, **kwargs):
        while newest(workdir) >= max(awaited, LATE) and not SENT[0]:
            time.sleep(0.002)
        return run(*args, **kwargs)

    StepRunner.run = held


def start(workdir: str, overrides: list[str], log: Path, awaited: int | None) -> int:
    """Starts a child that trains, with its output in a file; returns its process id.

    Args:
        workdir: where it trains.
        overrides: of the config.
        log: the file.
        awaited: the checkpoint that a signal comes after; None: it comes at any time, or never.
    """
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # A job started in the background would ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train_loop._GRACE_SECONDS = 600.0  # a busy machine comes late to its safe point
        if awaited is not None:
            hold(Path(workdir), awaited)
        code = cli.main(["train", "--config", CONFIG, "--workdir", workdir, *overrides])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def signal_at(
    process: int, sent: signal.Signals, awaited: int | None, delay: float, workdir: Path
) -> None:
    """Sends the signal, unless the process ends before its moment comes."""
    while awaited is not None and newest(workdir) < awaited:
        time.sleep(0.002)
        # Leaves its exit code to be asked for again.
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
    time.sleep(delay)
    os.kill(process, sent)
    SENT[0] = True


if __name__ == "__main__":
    for line in sys.stdin:
        folder, name, after, wait = line.split()
        workdir, step, SENT[0] = Path(folder), int(after), False
        awaited = None if name == "-" or step < 0 else max(step, newest(workdir) + 1)
        pid = start(folder, sys.argv[1:], Path(folder + ".log"), awaited)
        if name != "-":
            signal_at(pid, signal.Signals[name], awaited, float(wait), workdir)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
