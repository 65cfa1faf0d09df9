"""How long a save of a big table keeps training waiting.

    python benchmarks/checkpoints.py --megabytes 512 --saves 5
    python benchmarks/checkpoints.py --megabytes 512 --saves 5 --devices 2 --processes 2

A step that updates the whole table in place (donated) runs on while checkpoints are written; what
counts is how long `save` blocks it, against the seconds until the checkpoint is complete.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks.rows import Rows, add_argument
from bilevel_flax.checkpoints.checkpointer import Checkpointer
from bilevel_flax.train import multihost as distributed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512, help="of the table")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("--port", type=int, default=8476, help="where the processes meet")
    parser.add_argument("--processes", type=int, default=1, help="with so many devices each")
    parser.add_argument("--train", action="store_true", help="run steps while it is being written")
    add_argument(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for process in range(1, options.processes):
            children.append(os.fork())
            if children[-1] == 0:
                measure(options, process, folder)
                os._exit(0)
        measure(options, 0, folder)
        for child in children:
            os.waitpid(child, 0)


def measure(options: argparse.Namespace, process: int, folder: str) -> None:
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        distributed.start(
            {
                "coordinator": f"127.0.0.1:{options.port}",
                "num_processes": options.processes,
                "process_id": process,
            }
        )
    everyone = (options.devices * options.processes,)
    mesh = jax.make_mesh(everyone, ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    columns = 1 << 14
    rows = options.megabytes * 2**20 // (4 * columns)

    make = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), (rows, columns)), out_shardings=sharding
    )
    state = {"table": make()}
    update = jax.jit(
        lambda s, i: {"table": s["table"].at[i % rows].multiply(0.9)}, donate_argnums=0
    )
    state = jax.block_until_ready(update(state, jnp.int32(0)))
    blocked, taken = [], []
    with Checkpointer(folder, keep=1, processes=distributed.Channel("checkpoints")) as checkpointer:
        for step in range(1, options.saves + 1):
            began = time.perf_counter()
            checkpointer.save(step, state, {})
            blocked.append(time.perf_counter() - began)
            while options.train and checkpointer.is_saving():
                state = jax.block_until_ready(update(state, jnp.int32(step)))
            checkpointer.wait()
            taken.append(time.perf_counter() - began)
    if options.processes > 1:
        jax.distributed.shutdown()
    if process:
        return
    share = statistics.median(b / t for b, t in zip(blocked, taken, strict=True))
    with Rows(options.markdown) as found:
        found.add(
            {
                "megabytes": options.megabytes,
                "devices": options.devices,
                "processes": options.processes,
                "seconds blocked": [round(s, 4) for s in blocked],
                "seconds of the save": [round(s, 3) for s in taken],
                "share blocked": round(share, 4),
            }
        )


if __name__ == "__main__":
    main()
