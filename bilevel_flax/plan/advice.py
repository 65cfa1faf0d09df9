"""The cheapest change that would make a step fit, estimated from what its memory holds.

From cheap to dear: rematerialisation costs about a fifth more operations, microbatches repeat the
gathers of sharded parameters, XLA's partitioner and more fsdp gather more, bfloat16 moments change
the numbers, and more chips cost money. Estimates, to be confirmed by planning again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_MAX_CHANGES = 3  # at once
_STATE: tuple[str, ...] = ("z", "v", "moments of z", "moments of v", "tables")
_MOMENTS: tuple[str, ...] = ("moments of z", "moments of v")


class Change(NamedTuple):
    """A way to need less memory.

    Attributes:
        setting: what it sets; of two changes of one setting only one can be made.
        how: what to give to the command.
        cost: what it costs.
        factors: part of the memory -> what its bytes are multiplied by.
    """

    setting: str
    how: str
    cost: str
    factors: Mapping[str, float]


def split_activations(
    parts: Mapping[str, int], *, reduces_once: bool, parameter_bytes: int
) -> dict[str, int]:
    """The parts with "activations" divided into what a smaller minibatch helps, and "gathered".

    Args:
        parts: `memory.composition`.
        reduces_once: as `Lowered.reduces_once`.
        parameter_bytes: of the whole of z.
    """
    # The parameters as they are used and three directions stay, whatever the minibatch.
    whole = 4 * (parameter_bytes if reduces_once else parts["z"])
    gathered = min(parts["activations"], whole)
    return {**parts, "activations": parts["activations"] - gathered, "gathered": gathered}


def changes(
    parts: Mapping[str, int],
    config: Any,
    mesh: Mapping[str, int],
    batch_size: int,
    *,
    reduces_once: bool,
    parameter_bytes: int,
) -> list[Change]:
    """What could be changed, from cheap to dear.

    Args:
        parts: `memory.composition`.
        config: of the run.
        mesh: axis -> size.
        batch_size: of an inner minibatch.
        reduces_once: as `Lowered.reduces_once`.
        parameter_bytes: of the whole of z.
    """
    problem = config.get("problem") or {}
    listed = []
    if not (config.get("remat") or problem.get("remat")):
        key = "remat" if "remat" in config else "problem.remat"
        cost = "about 1.2 times the FLOPs"
        listed.append(Change("remat", f"--config.{key}=True", cost, {"activations": 1 / 2}))
    share = max(1, batch_size // (mesh["data"] * mesh["fsdp"]))
    now, factor = problem.get("microbatches") or 1, 2
    while share % (now * factor) == 0:
        how = f"--config.problem.microbatches={now * factor}"
        cost = "as many passes over the parameters"
        listed.append(Change("microbatches", how, cost, {"activations": 1 / factor}))
        factor *= 2
    if reduces_once and mesh["fsdp"] > 1:
        cost = "parameters gathered layer by layer"
        factors = {"gathered": parts["z"] / parameter_bytes}
        listed.append(Change("reduction", "--config.reduction=gspmd", cost, factors))
    fsdp, data = mesh["fsdp"], mesh["data"]
    while data % 2 == 0:
        fsdp, data = 2 * fsdp, data // 2
        factors = dict.fromkeys(_STATE, mesh["fsdp"] / fsdp)
        listed.append(Change("mesh", f"--mesh data={data},fsdp={fsdp}", "longer gathers", factors))
    if sum(parts[name] for name in _MOMENTS) >= 2 * parts["z"]:
        how, cost = "--config.solver.inner.mu_dtype=bfloat16", "first moments of 8 bits' precision"
        listed.append(Change("mu_dtype", how, cost, dict.fromkeys(_MOMENTS, 3 / 4)))
    how = "twice the chips, all of them along fsdp"
    listed.append(Change("mesh", how, "money", dict.fromkeys(_STATE, 1 / 2)))
    return listed


def needed(parts: Mapping[str, int], chosen: Iterable[Change]) -> int:
    """Bytes on a chip after changes, about; `parts` from `split_activations`."""
    chosen = list(chosen)
    return round(
        sum(
            size * math.prod(change.factors.get(name, 1) for change in chosen)
            for name, size in parts.items()
        )
    )


def cheapest(parts: Mapping[str, int], candidates: list[Change], available: int) -> str:
    """One line: the first change that suffices, else the first few that do so together.

    Args:
        parts: from `split_activations`.
        candidates: from `changes`.
        available: bytes of a chip.
    """
    possible = [
        chosen
        for count in range(1, _MAX_CHANGES + 1)
        for chosen in itertools.combinations(candidates, count)
        if len({change.setting for change in chosen}) == count
    ]
    for chosen in possible:
        if needed(parts, chosen) <= available:
            return _described(parts, chosen)
    best = min(possible, key=lambda chosen: needed(parts, chosen))
    return f"none of these suffices; the most that {_MAX_CHANGES} help: {_described(parts, best)}"


def _described(parts: Mapping[str, int], chosen: Iterable[Change]) -> str:
    listed = " and ".join(f"{change.how} ({change.cost})" for change in chosen)
    return f"{listed}: about {needed(parts, chosen) / 2**30:.1f} GiB"
