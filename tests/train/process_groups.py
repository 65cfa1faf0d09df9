"""A program that runs jobs in groups of processes: reads JSON lines, forks, reports, one line each.

    {"job": "module:function", "count": 2, "devices": 4, "arguments": [...], "log": "file"}

forks `count` processes that are joined by `jax.distributed` (none of it where count is 1), have
`devices` CPU devices each, and call the function. The answer is a list of exit codes, negative for
a signal. What a process prints goes to `<log>.<process>`. With "signal": [process, name, folder]
one of them is sent a signal as soon as there is something in the folder.

Forking spares importing everything anew, which takes seconds for each process; no jax backend and
no threads run in the parent.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback

import grain  # noqa: F401  imported before the forks
import jax
import orbax.checkpoint  # noqa: F401

import bilevel_flax.train.experiment  # noqa: F401
import tests.faults.small_run  # noqa: F401
from bilevel_flax.checkpoints import checkpointer as checkpoint
from bilevel_flax.train import multihost as distributed

SECONDS = 120  # after which a process that hangs is killed; it has to show as a failure


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def child(order: dict, process: int, port: int) -> int:
    """Runs the job; returns the exit code."""
    with open(f"{order['log']}.{process}", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(SECONDS)
    jax.config.update("jax_num_cpu_devices", order["devices"])
    module, function = order["job"].split(":")
    os.environ.update(order.get("environment", {}))
    settings = {
        "coordinator": f"127.0.0.1:{port}",
        "num_processes": order["count"],
        "process_id": process,
    }
    try:
        if order["count"] > 1:
            distributed.start(settings)
        code = getattr(importlib.import_module(module), function)(*order.get("arguments", []))
    except Exception as error:
        if not isinstance(error, ValueError | checkpoint.CheckpointError | distributed.PeerError):
            traceback.print_exc()
        print(f"error: {error}", flush=True)
        code = 1
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    return code or 0


def run(order: dict) -> list[int]:
    port = free_port()
    pids = []
    for process in range(order["count"]):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(order, process, port)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    if order.get("signal"):
        process, name, folder = order["signal"]
        while not (os.path.isdir(folder) and any(n.isdecimal() for n in os.listdir(folder))):
            time.sleep(0.01)
            if os.waitid(os.P_PID, pids[process], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        else:
            os.kill(pids[process], signal.Signals[name])
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
