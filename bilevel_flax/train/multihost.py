"""Many processes, one run: they start together, make sure that they do the same, end together.

What they say to each other goes through a `channel.Channel`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

from bilevel_flax import deprecated
from bilevel_flax.train.channel import (
    SECONDS,
    Channel,
    PeerError,
    is_leader,
    process_count,
    process_index,
)

__all__ = [
    "Channel",
    "PeerError",
    "check_same",
    "is_leader",
    "leave",
    "process_count",
    "process_index",
    "start",
]

_HEARTBEAT_SECONDS = 30
_GOODBYE_SECONDS = 10


def start(settings: Any = None) -> None:
    """Joins the other processes, if there are any; must come before any use of a device.

    Args:
        settings: a dict of `coordinator` ("host:port" of process 0), `num_processes` and
            `process_id`, each None where the cluster says so itself (Cloud TPU, SLURM, Open MPI,
            Kubernetes); "auto": it says all three; None or False: the environment variables
            `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` decide, and without
            the first of them this is a single process.

    Raises:
        ValueError: settings that are none of this; a cluster that is not recognised. (Where the
            others do not come, the program ends with a line that says so.)

    Example:
        >>> from bilevel_flax.train import multihost
        >>> multihost.start()  # without JAX_COORDINATOR_ADDRESS: a single process
        >>> multihost.process_count()
        1
    """
    if jax.distributed.is_initialized():
        return
    given = _settings(settings)
    if given is None:
        return
    # A signal is a matter of the training loop (`train_loop`), which asks all processes for it.
    jax.config.update("jax_enable_preemption_service", False)
    seconds = int(os.environ.get("BILEVEL_FLAX_JOIN_SECONDS", "300"))
    # Left to itself, JAX's client ends the program with a stack trace of C++.
    alarm = threading.Timer(seconds, _give_up, (given, seconds))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            given["coordinator"],
            given["num_processes"],
            given["process_id"],
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            initialization_timeout=seconds + 60,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"distributed={settings!r}: the processes could not be joined ({reason}); give "
            "coordinator=HOST:PORT of process 0, num_processes and process_id, before any use of "
            "a device"
        ) from error
    finally:
        alarm.cancel()


def _give_up(given: Mapping[str, Any], seconds: int) -> None:
    at = given["coordinator"] or os.environ.get("JAX_COORDINATOR_ADDRESS", "the coordinator")
    print(
        f"error: the {given['num_processes'] or ''} processes did not all meet at {at} within "
        f"{seconds} s (BILEVEL_FLAX_JOIN_SECONDS): start all of them, with the same coordinator, "
        "which every host must reach",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _settings(settings: Any) -> dict[str, Any] | None:
    names = ("coordinator", "num_processes", "process_id")
    if settings == "auto":
        return dict.fromkeys(names)
    if isinstance(settings, Mapping):
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise ValueError(f"distributed.{unknown[0]}: unknown; there are {', '.join(names)}")
        given = {name: settings.get(name) for name in names}
        return given if any(value is not None for value in given.values()) else None
    if settings:
        raise ValueError(f'distributed={settings!r}: must be "auto", a dict, or None')
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return None
    numbers = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    count, index = (None if number is None else int(number) for number in numbers)
    return {"coordinator": None, "num_processes": count, "process_id": index}


def check_same(channel: Channel, facts: Mapping[str, Any]) -> None:
    """Makes sure that all processes are about to do the same.

    Args:
        channel: of all processes.
        facts: names and values that must agree: the config, the sizes of the data, the seed.

    Raises:
        ValueError: a process differs from process 0; it is named, with the first values that do.

    Example:
        >>> from bilevel_flax.train import multihost
        >>> multihost.check_same(multihost.Channel("example"), {"seed": 0, "examples": 1000})
    """
    # As text: NaN is the same as NaN, and 1 is not True.
    mine = {name: json.dumps(value, default=str) for name, value in facts.items()}
    everyone = channel.all_gather(mine)
    for process, other in enumerate(everyone):
        names = [name for name in everyone[0] | other if everyone[0].get(name) != other.get(name)]
        if names:
            shown = "; ".join(
                f"{name}: {everyone[0].get(name, 'nothing')} on process 0, "
                f"{other.get(name, 'nothing')} on process {process}"
                for name in names[:3]
            )
            raise ValueError(
                f"the processes differ ({shown}): start all of them with the same config and data"
            )


def leave(code: int) -> None:
    """The last thing a program of many processes does, with its exit code.

    Where all come to this they part in peace. Where one alone does, because it failed, waiting for
    the others would keep it, and them, for minutes: it goes at once, and they learn of it.
    """
    if process_count() == 1 or not jax.distributed.is_initialized():
        return
    try:
        Channel("end", _GOODBYE_SECONDS if code else SECONDS).all_gather(code)
        jax.distributed.shutdown()
    except (PeerError, RuntimeError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 1)


__getattr__ = deprecated.names(__name__)
