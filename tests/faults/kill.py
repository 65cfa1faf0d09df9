"""Kills training runs with `kill -9` and checks that nothing of it can be seen in the results.

    python tests/faults/kill.py --kills 100 --pairs 10

Single processes are killed at random moments and in the middle of a step, of a save and of a full
pass; then one of two processes that train together. After each kill the run must go on from the
last checkpoint that was complete when it died, and in the end state and metrics must be those of a
run that nobody touched, bit for bit. Prints one JSON object; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PHASES = ("step", "refresh", "save")
STARTED = "a new session\n"
PATIENCE = 120.0  # seconds for the survivor of a pair to notice
PAIR_STEPS = 120
PAIR = (
    "--config.log_every=20",
    "--config.eval_every=60",
    "--config.checkpoint.every=20",
    "--config.solver.period=30",
    "--config.mesh=data=4",
)


class Flags:
    """What a process is doing, in memory that it shares with the one that will kill it."""

    def __init__(self):
        self._bytes = mmap.mmap(-1, len(PHASES))

    def clear(self) -> None:
        self._bytes[:] = bytes(len(PHASES))

    def now(self) -> set[str]:
        return {name for i, name in enumerate(PHASES) if self._bytes[i]}

    def during(self, name: str, function: Any) -> Any:
        """The function, with the flag up while it runs."""

        def marked(*args, **kwargs):
            self._bytes[PHASES.index(name)] = 1
            try:
                return function(*args, **kwargs)
            finally:
                self._bytes[PHASES.index(name)] = 0

        return marked


def child(workdir: Path, arguments: list[str], devices: int, flags: Flags | None) -> int:
    """Starts a process that trains; returns its id. Its output goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        import jax

        from bilevel_flax import cli
        from bilevel_flax.checkpoints import collective
        from bilevel_flax.train.step_runner import StepRunner

        with workdir.with_suffix(".log").open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        jax.config.update("jax_num_cpu_devices", devices)
        if flags is not None:
            StepRunner.run = flags.during("step", StepRunner.run)
            StepRunner.refresh = flags.during("refresh", StepRunner.refresh)
            collective.write = flags.during("save", collective.write)
        code = cli.main(
            ["train", "--config", "tests/faults/small_run.py:srba", "--workdir", str(workdir)]
            + arguments
        )
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def exit_code(pid: int, seconds: float = 1e9) -> int | None:
    """Its exit code; None (and its end) where it has none after so many seconds."""
    deadline = time.monotonic() + seconds
    while not ended(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest(workdir: Path) -> int:
    """The newest step that has a checkpoint, -1 without any."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def kill(pid: int, workdir: Path, draw: random.Random, flags: Flags, last: int) -> set[str] | None:
    """Kills it at a moment that chance chooses; None if it had ended before.

    Returns:
        What it was doing when it died.
    """
    aim = draw.choice([*PHASES, "anything"])
    past = draw.randrange(-1, last)  # a checkpoint of this step or later has to be there
    early = draw.uniform(0, 3) if draw.random() < 0.2 else None
    while not ended(pid):
        if early is not None:
            time.sleep(early)
            break
        if newest(workdir) > past and (aim == "anything" or aim in flags.now()):
            time.sleep(draw.uniform(0, 0.02 if aim == "save" else 0.002))
            break
        time.sleep(0 if newest(workdir) > past else 0.002)
    if ended(pid):
        return None
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    return flags.now()


def fingerprint(workdir: Path, steps: int) -> str:
    """A hash of all that must not depend on interruptions: the metrics and the last state."""
    read, write = os.pipe()
    pid = os.fork()  # Orbax starts a jax backend, which must not run where processes are forked.
    if pid == 0:
        from etils import epath

        from bilevel_flax.checkpoints import format

        path = epath.Path(workdir / "checkpoints" / str(steps))
        arrays = format.read_arrays(path, format.read_document(path, steps))
        digest = hashlib.blake2b((workdir / "metrics.jsonl").read_bytes())
        for name in sorted(arrays):
            digest.update(name.encode() + bytes(memoryview(arrays[name]).cast("B")))
        os.write(write, digest.hexdigest().encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = pipe.read()
    os.waitpid(pid, 0)
    return found


def resumed(workdir: Path) -> list[int | None]:
    """For each start of the run, the step at which it says that it went on; None if it did not."""
    found = []
    for session in workdir.with_suffix(".log").read_text().split(STARTED)[1:]:
        lines = [line for line in session.splitlines() if line.startswith("resuming ")]
        found.append(int(lines[0].split()[-1]) if lines else None)
    return found


def start(workdir: Path, count: int, steps: int, flags: Flags | None = None) -> list[int]:
    """The processes of a run: one, or two that train together."""
    with workdir.with_suffix(".log").open("a") as file:
        file.write(STARTED)
    length = f"--config.steps={steps}"
    if count == 1:
        return [child(workdir, [length], 1, flags)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    joined = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
    return [
        child(workdir, [length, *PAIR, *joined, f"--process-id={i}"], 2, flags if i == 0 else None)
        for i in range(count)
    ]


def campaign(
    folder: Path, kills: int, count: int, steps: int, draw: random.Random
) -> dict[str, Any]:
    """So many kills of runs of `count` processes each; says what was seen."""
    flags = Flags()
    whole = folder / f"whole{count}"
    codes = [exit_code(pid) for pid in start(whole, count, steps)]
    assert codes == [0] * count, whole.with_suffix(".log").read_text()
    reference = fingerprint(whole, steps)
    seen: dict[str, Any] = {"kills": 0, "runs": 0, "lost": 0, "different": 0, "other_failures": []}
    seen |= {f"in a {phase}": 0 for phase in PHASES} | {"elsewhere": 0}
    if count > 1:
        seen["seconds until the other ended"] = []
    while seen["kills"] < kills:
        workdir = folder / f"run{count}-{seen['runs']}"
        committed = []
        for _ in range(draw.randint(3, 7)):
            flags.clear()
            pids = start(workdir, count, steps, flags)
            victim = draw.randrange(count)
            doing = kill(pids[victim], workdir, draw, flags, steps)
            began = time.monotonic()
            others = [exit_code(pid, PATIENCE) for pid in pids if pid != pids[victim]]
            if doing is None:
                exit_code(pids[victim])
                committed.append(newest(workdir))
                break
            if count > 1:
                seen["seconds until the other ended"].append(round(time.monotonic() - began, 1))
                seen["other_failures"] += ["hung" for code in others if code is None]
            committed.append(newest(workdir))
            seen["kills"] += 1
            for phase in doing:
                seen[f"in a {phase}"] += 1
            seen["elsewhere"] += not doing
            if seen["kills"] == kills:
                break
        codes = [exit_code(pid) for pid in start(workdir, count, steps)]
        log = workdir.with_suffix(".log").read_text()
        if codes != [0] * count or (count == 1 and "Traceback" in log) or "damaged" in log:
            seen["other_failures"].append(f"{workdir.name}: {codes}")
            continue
        seen["runs"] += 1
        # A session that was killed early, or found the run finished, says nothing of resuming.
        for at, saved in zip(resumed(workdir), [-1, *committed], strict=True):
            seen["lost"] += at is not None and at != saved
        seen["different"] += fingerprint(workdir, steps) != reference
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of single processes")
    parser.add_argument("--pairs", type=int, default=10, help="kills of one of two processes")
    parser.add_argument("--steps", type=int, default=1000, help="of a single process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["BILEVEL_FLAX_JOIN_SECONDS"] = "40"  # one that was killed early never comes
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        import grain  # noqa: F401  imported once, before the forks
        import orbax.checkpoint  # noqa: F401

        import bilevel_flax.train.experiment  # noqa: F401
        import tests.faults.small_run  # noqa: F401

        draw = random.Random(options.seed)
        found = {}
        for name, kills, count, steps in (
            ("single", options.kills, 1, options.steps),
            ("pair", options.pairs, 2, PAIR_STEPS),
        ):
            if kills:
                found[name] = campaign(Path(folder), kills, count, steps, draw)
    print(json.dumps(found))
    bad = [seen["lost"] or seen["different"] or seen["other_failures"] for seen in found.values()]
    return int(any(bad))


if __name__ == "__main__":
    sys.exit(main())
