"""How the processes that write one checkpoint talk to each other; the talk of a single one."""

import json
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from bilevel_flax.checkpoints.errors import CheckpointError, Damaged, reason

_T = TypeVar("_T")


class Processes(Protocol):
    """How the processes of one run talk to each other; all make the same calls in the same order.

    Attributes:
        count: how many there are.
        is_leader: whether this is the one that makes folders and writes metadata.
        broadcast: the leader's value (anything that JSON holds), on every process.
        all_gather: everyone's value (anything that JSON holds), by process.
        barrier: returns when every process has come to it.

    Example:
        >>> class Single:  # what a run of one process needs
        ...     count, is_leader = 1, True
        ...     def broadcast(self, value): return value
        ...     def all_gather(self, value): return [value]
        ...     def barrier(self): pass
    """

    @property
    def count(self) -> int: ...  # noqa: D102

    @property
    def is_leader(self) -> bool: ...  # noqa: D102

    def broadcast(self, value: Any) -> Any: ...  # noqa: D102

    def all_gather(self, value: Any) -> list[Any]: ...  # noqa: D102

    def barrier(self) -> None: ...  # noqa: D102


class SingleProcess:
    """The only process there is."""

    count = 1
    is_leader = True

    def broadcast(self, value: Any) -> Any:
        """The value, after a round trip through JSON."""
        return json.loads(json.dumps(value))

    def all_gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [self.broadcast(value)]

    def barrier(self) -> None:
        """Nobody to wait for."""


def run_on_all(
    processes: Processes, function: Callable[[], tuple[_T, Any]]
) -> tuple[_T, list[Any]]:
    """Runs something on every process, with one outcome for all.

    `function` returns something to keep here and something to tell the others (JSON); what comes
    back is the former, and what everyone told.

    Raises:
        Damaged: at least one process found damage, and nothing worse happened.
        CheckpointError: it failed elsewhere only; the first such process is named.
        Exception: whatever it raised here.
    """
    result: Any = None
    told, kind, text = None, "", ""
    failure = None
    try:
        result, told = function()
    except Exception as error:
        failure = error
        kind = "damaged" if isinstance(error, Damaged) else "failed"
        text = reason(error) if kind == "failed" else str(error)
    outcomes = processes.all_gather([kind, text, told])
    for worst, raised in (("failed", CheckpointError), ("damaged", Damaged)):
        for process, (theirs, why, _) in enumerate(outcomes):
            if theirs == worst:
                if failure is not None and kind == worst:
                    raise failure
                raise raised(f"process {process}: {why}")
    return result, [outcome[2] for outcome in outcomes]


def run_on_leader(processes: Processes, function: Callable[[], Any]) -> Any:
    """Runs something on the leader alone; everyone gets its result (JSON), or fails with it."""
    return run_on_all(processes, lambda: (None, function() if processes.is_leader else None))[1][0]
