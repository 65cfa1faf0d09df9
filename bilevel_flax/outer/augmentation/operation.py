"""What a policy knows of an operation: its unit, its range, and whether it goes both ways."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Operation(NamedTuple):
    """One way to change an example, by an amount; by 0 it changes nothing.

    Attributes:
        name: as users write it.
        unit: of its amounts.
        limit: the largest magnitude that a policy can learn, unless told otherwise, in `unit`.
        most: the largest limit that makes sense.
        signed: amounts are drawn from [-magnitude, magnitude], else from [0, magnitude].
        graded: False: it is applied or not, its magnitude is 1 and is not learned.
    """

    name: str
    unit: str
    limit: float
    most: float
    signed: bool = True
    graded: bool = True


def chosen(known: Mapping[str, Operation], names: Sequence[str]) -> tuple[Operation, ...]:
    """The operations called `names`, in the order in which they are applied.

    Raises:
        ValueError: none, an unknown name (the nearest is given), or one name twice.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"operations is empty: choose among {', '.join(known)}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"operations: {name!r} is unknown, choose among {', '.join(known)}{hint}"
            )
        if names.count(name) > 1:
            raise ValueError(f"operations: {name!r} occurs {names.count(name)} times, give it once")
    return tuple(operation for name, operation in known.items() if name in names)


def limits_of(
    operations: Sequence[Operation], limits: Mapping[str, float | None]
) -> tuple[float, ...]:
    """Each operation's largest magnitude, `limits` where it says so.

    Raises:
        ValueError: a limit of an operation that is not there or is not graded, or out of range.
    """
    graded = {operation.name: operation for operation in operations if operation.graded}
    for name, limit in limits.items():
        if limit is None:
            continue
        if name not in graded:
            raise ValueError(
                f"limits[{name!r}]={limit}: the policy has no such operation with a magnitude, "
                f"only {', '.join(graded) or 'none'}"
            )
        if not (math.isfinite(limit) and 0 < limit <= graded[name].most):
            raise ValueError(
                f"limits[{name!r}]={limit} must lie in (0, {graded[name].most:g}] "
                f"({graded[name].unit})"
            )
    given = {name: float(limit) for name, limit in limits.items() if limit is not None}
    return tuple(given.get(operation.name, operation.limit) for operation in operations)
