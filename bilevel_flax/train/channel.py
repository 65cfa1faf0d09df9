"""What the processes of one run say to each other, and who of them this is.

All that they exchange are strings in the key-value store of `jax.distributed`. No device takes
part, so a background thread may do so while the devices train, and nothing waits without a time
limit. With one process everything here is immediate.
"""

from __future__ import annotations

import collections
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jax._src import distributed as _service  # the client has no public name; Orbax does the same

from bilevel_flax import deprecated

_T = TypeVar("_T")
SECONDS = 1800.0  # A process may take long (a slow disk); one that has died is noticed at once.
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

    def __init__(self, name: str, seconds: float = SECONDS):
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
