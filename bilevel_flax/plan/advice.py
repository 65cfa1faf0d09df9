"""The cheapest change that would make a step fit, estimated from what its memory holds.

From cheap to dear: rematerialisation costs about a fifth more operations, microbatches repeat the
gathers of sharded parameters, more fsdp and XLA's partitioner gather more, bfloat16 moments change
the numbers, and more chips cost money. Estimates, to be confirmed by planning again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A way to need less memory.

    Attributes:
        how: what to give to the command.
        cost: what it costs.
        bytes: that would then be needed on a chip, about.
    """

    how: str
    cost: str
    bytes: int


def changes(
    parts: Mapping[str, int],
    config: Any,
    mesh: Mapping[str, int],
    batch_size: int,
    *,
    floor: bool,
    parameter_bytes: int,
) -> list[Change]:
    """What could be changed, from cheap to dear, each with what would then be needed.

    Args:
        parts: `memory.composition`.
        config: of the run.
        mesh: axis -> size.
        batch_size: of an inner minibatch.
        floor: as `Traced.floor`.
        parameter_bytes: of the whole of z.
    """
    total = sum(parts.values())
    problem = config.get("problem") or {}
    found = []
    remat = bool(config.get("remat")) or bool(problem.get("remat"))
    # Directions and gathered parameters stay, whatever becomes of the activations.
    whole = 4 * parameter_bytes if floor else 4 * parts["z"]
    loose = max(0, parts["activations"] - whole)
    if not remat:
        key = "remat" if "remat" in config else "problem.remat"
        found.append(
            Change(f"--config.{key}=True", "about 1.2 times the FLOPs", total - loose // 2)
        )
    share = max(1, batch_size // (mesh["data"] * mesh["fsdp"]))
    now = problem.get("microbatches") or 1
    factor = 2
    while share % (now * factor) == 0:
        found.append(
            Change(
                f"--config.problem.microbatches={now * factor}",
                "as many passes over the parameters",
                total - loose + loose // factor,
            )
        )
        factor *= 2
    if floor and mesh["fsdp"] > 1:
        saved = min(parts["activations"], 4 * (parameter_bytes - parts["z"]))
        found.append(
            Change("--config.collectives=xla", "parameters gathered layer by layer", total - saved)
        )
    state = sum(parts[name] for name in ("z", "v", "moments of z", "moments of v", "tables"))
    fsdp, data = mesh["fsdp"], mesh["data"]
    while data % 2 == 0:
        fsdp, data = 2 * fsdp, data // 2
        saved = state - state * mesh["fsdp"] // fsdp
        found.append(Change(f"--mesh data={data},fsdp={fsdp}", "longer gathers", total - saved))
    moments = parts["moments of z"] + parts["moments of v"]
    if moments >= 2 * parts["z"]:
        found.append(
            Change(
                "--config.solver.inner.mu_dtype=bfloat16",
                "first moments of 8 bits' precision",
                total - moments // 4,
            )
        )
    found.append(Change("twice the chips, all of them along fsdp", "money", total - state // 2))
    return found


def cheapest(candidates: list[Change], available: int) -> str:
    """One line: the first change that suffices, or the two that help most."""
    for one in candidates:
        if one.bytes <= available:
            return f"{one.how}: about {one.bytes / 2**30:.1f} GiB ({one.cost})"
    best = sorted(candidates, key=lambda one: one.bytes)[:2]
    listed = " and ".join(f"{one.how} (alone: {one.bytes / 2**30:.1f} GiB)" for one in best)
    return f"none alone; together {listed}"
