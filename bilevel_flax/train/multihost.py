"""Many processes, one run: they start together, agree on things, and end together.

All that they exchange are strings in the key-value store of `jax.distributed`. No device takes
part, so a background thread may do so while the devices train, and nothing waits without a time
limit. With one process everything here is immediate.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed as _service  # the client has no public name; Orbax does the same

from bilevel_flax import deprecated

_T = TypeVar("_T")
_SECONDS = 1800.0  # A process may take long (a slow disk); one that has died is noticed at once.
_HEARTBEAT_SECONDS = 30
_GOODBYE_SECONDS = 10
_OLD_METHODS = {
    "exchange": "all_gather",
    "lead": "broadcast",
    "together": "run_on_all",
    "each": "run_on_each",
    "on_leader": "run_on_leader",
    "leads": "is_leader",
}
_NUMBERS: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)


class PeerError(RuntimeError):
    """Another process failed or has gone; the message names it and says why, in one line."""


def process_count() -> int:
    """How many processes there are; asks no device."""
    return _service.global_state.num_processes


def process_index() -> int:
    """Which of them this is."""
    return _service.global_state.process_id or 0


def is_leader() -> bool:
    """Whether this is process 0: the one that writes logs, metrics and reports."""
    return process_index() == 0


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


class Channel:
    """One conversation of all processes, in rounds.

    Every process makes its channels in the same order and speaks on each in the same order. Threads
    may share one: each has rounds of its own, told apart by the thread's name, which must then be
    the same on every process.

    Args:
        name: what it is about; channels of one name are told apart by their number.
        seconds: how long to wait for an answer.

    Example:
        >>> Channel("example").all_gather({"rows": 3})  # one process
        [{'rows': 3}]
    """

    def __init__(self, name: str, seconds: float = _SECONDS):
        self._name = f"{name}-{next(_NUMBERS[name])}"
        self._rounds: dict[str, int] = collections.defaultdict(int)  # by thread
        self._seconds = seconds

    @property
    def is_leader(self) -> bool:
        """Whether this is process 0."""
        return is_leader()

    @property
    def count(self) -> int:
        """How many processes there are."""
        return process_count()

    def all_gather(self, value: Any) -> list[Any]:
        """Gives a value, gets everyone's.

        Args:
            value: anything that JSON holds.

        Returns:
            The values by process, after a round trip through JSON.

        Raises:
            PeerError: a process has gone, or did not answer in time.
        """
        text = json.dumps(value)
        if process_count() == 1:
            return [json.loads(text)]
        client = _service.global_state.client
        if client is None:
            raise PeerError("jax.distributed has been shut down")
        thread = threading.current_thread().name
        own, number = process_index(), self._rounds[thread]
        self._rounds[thread] += 1

        def key(process: int, number: int) -> str:
            return f"bilevel_flax/{self._name}/{thread}/{number}/{process}"

        values = []
        waited = 0
        try:
            client.key_value_set(key(own, number), text)
            for process in range(process_count()):
                waited = process
                milliseconds = int(1000 * self._seconds)
                values.append(client.blocking_key_value_get(key(process, number), milliseconds))
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise PeerError(
                f"process {waited} of {process_count()} has gone, or gave no answer within "
                f"{self._seconds:g} s ({reason}); start all processes again: they resume"
            ) from error
        if number:
            # Everyone has spoken in this round, so everyone has heard the last one.
            client.key_value_delete(key(own, number - 1))
        return [json.loads(value) for value in values]

    def broadcast(self, value: _T) -> _T:
        """Process 0's value, on every process."""
        return self.all_gather(value if self.is_leader else None)[0]

    def barrier(self) -> None:
        """Waits until every process has come here."""
        self.all_gather(None)

    def run_on_all(self, function: Callable[[], Any]) -> list[Any]:
        """Runs something on every process; if it fails on one, it fails on all.

        Args:
            function: returns what JSON holds.

        Returns:
            Everyone's result, by process.

        Raises:
            PeerError: it failed elsewhere only; the first such process is named.
            Exception: whatever it raised here.
        """
        try:
            outcome: dict[str, Any] = {"result": function()}
            failure = None
        except Exception as error:
            failure = error
            outcome = {"error": " ".join(str(error).split()) or type(error).__name__}
        outcomes = self.all_gather(outcome)
        if failure is not None:
            raise failure
        for process, other in enumerate(outcomes):
            if "error" in other:
                raise PeerError(f"process {process}: {other['error']}")
        return [other["result"] for other in outcomes]

    def run_on_each(self, function: Callable[[], _T]) -> _T:
        """Runs something on every process, as `run_on_all`, and gives what it returned here."""
        results: list[_T] = []
        self.run_on_all(lambda: results.append(function()))
        return results[0]

    def run_on_leader(self, function: Callable[[], Any]) -> Any:
        """Runs something on process 0; every process gets the result (JSON), or fails with it."""
        return self.run_on_all(lambda: function() if self.is_leader else None)[0]

    def __getattr__(self, name: str) -> Any:
        if name not in _OLD_METHODS:
            raise AttributeError(f"Channel has no attribute {name!r}")
        return deprecated.renamed(f"Channel.{name}", self, _OLD_METHODS[name])


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
        Channel("end", _GOODBYE_SECONDS if code else _SECONDS).all_gather(code)
        jax.distributed.shutdown()
    except (PeerError, RuntimeError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 1)


__getattr__ = deprecated.names(__name__)
