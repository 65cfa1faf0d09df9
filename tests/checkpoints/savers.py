"""A program for kill -9: reads `step delay` lines, saves on from that step, dies within the delay.

Forks its savers, for importing everything anew costs seconds. No jax backend and no threads run in
the parent: the states are NumPy's.
"""

import os
import signal
import sys
import time

import numpy as np

from bilevel_flax.checkpoints.checkpointer import Checkpointer


def make_state(step: int) -> dict[str, np.ndarray]:
    """A state that its step determines."""
    return {"w": np.random.default_rng(step).normal(size=3000), "step": np.array(step)}


def save_forever(directory: str, step: int, pipe: int) -> None:
    """Saves step after step and writes a byte for each to the pipe."""
    with Checkpointer(directory, keep=2, asynchronous=False) as checkpointer:
        while True:
            step += 1
            checkpointer.save(step, make_state(step), {"at": step})
            os.write(pipe, b".")


if __name__ == "__main__":
    for line in sys.stdin:
        step, delay = line.split()
        saved, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            save_forever(sys.argv[1], int(step), pipe)
        os.close(pipe)  # else the read below waits for ever where the child has failed
        assert os.read(saved, 1), "the child has failed"
        os.close(saved)
        time.sleep(float(delay))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
