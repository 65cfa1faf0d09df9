"""What a compiled program sends between chips, read from its HLO text.

XLA lists the body of a loop once; here each instruction counts as often as it runs: bodies of
loops times their trip counts, nested ones times both, called computations at each call. An
asynchronous pair (`all-gather-start`, `all-gather-done`) is one collective, counted at its end,
whose result is the collective's own. TPUs spread one collective over several fusions with other
work (its start, a part beside each, its end), all of one channel: that is one, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_CONSTANT = re.compile(r"^[su](?:8|16|32|64)\[\](?:\{[^}]*\})?\s+constant\((\d+)\)")
_GROUPS = re.compile(r"\breplica_groups=(\{\{[\d,]*\}|\{\}|\[[\d,]+\]|mesh\[[^\]]*\]\s*\{[^}]*\})")
# A reduce-scatter as TPUs run it: a fusion around an all-reduce and the slice of its result.
_SCATTER = "all-reduce-scatter"
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective instruction of a program.

    Attributes:
        kind: one of `KINDS`.
        bytes: of its result on one chip, all parts of a combined one together.
        count: how often it runs in one run of the program.
        group_size: chips that take part in one of its groups; None: all of them.
        op_name: where in the traced Python program it comes from, as far as XLA knows.
        channel: XLA's number for it; "": none.
    """

    kind: str
    bytes: int
    count: int
    group_size: int | None = None
    op_name: str = ""
    channel: str = ""


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def collectives(text: str, *, unknown_trips: int = 1) -> dict[str, dict[str, int]]:
    """Collectives by kind, for one chip and one run of the program.

    Args:
        text: `compiled.as_text()` of `jax.jit(...).lower(...).compile()`.
        unknown_trips: how often the body of a loop runs whose trip count the program decides.

    Returns:
        kind -> {"count", "bytes"}: how many run, and the bytes of their results. Collectives
        among groups of one chip move nothing and are left out.

    Raises:
        ValueError: the text holds no HLO module.

    Example:
        >>> text = '''
        ... HloModule step
        ...
        ... ENTRY %main (p: f32[8]) -> f32[8] {
        ...   %p = f32[8]{0} parameter(0)
        ...   ROOT %sum = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
        ... }
        ... '''
        >>> collectives(text)
        {'all-reduce': {'count': 1, 'bytes': 32}}
    """
    return by_kind(instructions(text, unknown_trips=unknown_trips))


def by_kind(program: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Sums up `instructions`; bytes and counts of each kind, in the order of `KINDS`."""
    program = list(program)
    totals: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        mine = [one for one in program if one.kind == kind]
        if mine:
            totals[kind] = {
                "count": sum(one.count for one in mine),
                "bytes": sum(one.count * one.bytes for one in mine),
            }
    return totals


def instructions(text: str, *, unknown_trips: int = 1) -> list[Collective]:
    """The collective instructions of a program one by one, each with how often it runs.

    Of the branches of a conditional the one that moves most bytes is taken.

    Args:
        text: as for `collectives`.
        unknown_trips: as for `collectives`.

    Raises:
        ValueError: the text holds no HLO module.
    """
    computations, entry = _parsed(text)
    if entry is None:
        raise ValueError("text holds no ENTRY computation: pass compiled.as_text()")
    return list(_walk(computations, entry, 1, unknown_trips))


def _parsed(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    computations: dict[str, list[_Instruction]] = {}
    entry, body = None, None
    for line in text.splitlines():
        header = None if line.startswith((" ", "HloModule")) else _COMPUTATION.match(line)
        if header:
            body = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif body is not None and (match := _INSTRUCTION.match(line)):
            shape, rest = _split_shape(match[2])
            if opcode := _OPCODE.match(rest):
                body.append(_Instruction(match[1], shape, opcode[1], rest[opcode.end() :]))
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """(the type of an instruction's result, what follows); a tuple's type holds blanks."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for end, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: end + 1], text[end + 1 :]
    return text, ""


def result_bytes(shape: str) -> int:
    """Bytes of a type as HLO writes it, `f32[8,4]{1,0}` or a tuple of such.

    Raises:
        ValueError: an element type whose size is not known.
    """
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        numbers = [int(dim.strip("<= ")) for dim in dims.split(",") if dim.strip()]
        total += -(-_bits(dtype) * math.prod(numbers) // 8)
    return total


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[sufc](\d+)", dtype)  # f8e4m3fn, s4 ...
    if match is None:
        raise ValueError(f"HLO's element type {dtype!r} is unknown: its size must be added")
    return int(match[1])


def _walk(
    computations: dict[str, list[_Instruction]], name: str, times: int, unknown_trips: int
) -> Iterator[Collective]:
    body = computations.get(name, [])
    starts = {one.name: one for one in body if one.opcode.endswith("-start")}
    fused: set[str] = set()
    for one in body:
        kind = one.opcode.removesuffix("-done")
        if kind in KINDS:
            # An asynchronous pair's groups stand at its start.
            operand = re.match(r"[^%]*%([\w.\-]+)", one.rest)
            start = starts.get(operand[1]) if operand and kind != one.opcode else None
            rest = one.rest if start is None else start.rest
            size = _group_size(rest)
            if size != 1:
                op_name = _OP_NAME.search(rest) or _OP_NAME.search(one.rest)
                channel = _CHANNEL.search(rest)
                yield Collective(
                    kind,
                    result_bytes(one.shape),
                    times,
                    size,
                    op_name[1] if op_name else "",
                    channel[1] if channel else "",
                )
            continue
        if one.opcode.removesuffix("-start") in KINDS:
            continue
        called = dict(_CALLED.findall(one.rest))
        if one.opcode == "while":
            trips = _trip_count(computations, one, called["condition"], unknown_trips)
            yield from _walk(computations, called["body"], times * trips, unknown_trips)
            yield from _walk(computations, called["condition"], times * (trips + 1), unknown_trips)
            continue
        if one.opcode == "fusion":
            for each in _walk(computations, called.get("calls", ""), times, unknown_trips):
                if each.channel and each.channel in fused:
                    continue
                fused.add(each.channel)
                if called["calls"].startswith(_SCATTER):
                    each = each._replace(kind="reduce-scatter", bytes=result_bytes(one.shape))
                yield each
            continue
        names = list(called.values())
        for listed in _BRANCHES.findall(one.rest):
            names += [branch.strip().lstrip("%") for branch in listed.split(",")]
        branches = [list(_walk(computations, n, times, unknown_trips)) for n in names]
        if one.opcode == "conditional":
            yield from max(branches, key=_moved, default=[])
        elif one.opcode not in ("async-update", "async-done"):
            yield from (each for branch in branches for each in branch)


def _moved(branch: list[Collective]) -> int:
    return sum(one.bytes * one.count for one in branch)


def _group_size(rest: str) -> int | None:
    groups = _GROUPS.search(rest)
    if groups is None or groups[1] == "{}":
        return None
    if groups[1].startswith("mesh"):  # mesh['a'=2,'b'=8] {'b'}: along b, or a part b:(1)4 of it
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']*)'=(\d+)", groups[1])}
        along = groups[1].partition("]")[2]
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", along)
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    if groups[1].startswith("["):  # [groups, size]<=[chips]
        return int(groups[1].strip("[]").split(",")[-1])
    return len([n for n in groups[1].strip("{}").split(",") if n])


def _trip_count(
    computations: dict[str, list[_Instruction]],
    loop: _Instruction,
    condition: str,
    unknown_trips: int,
) -> int:
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    # `lax.scan` counts from 0 in steps of 1 up to the only constant of its condition.
    limits = set(_constants(computations, condition))
    return limits.pop() if len(limits) == 1 else unknown_trips


def _constants(computations: dict[str, list[_Instruction]], name: str) -> Iterator[int]:
    for one in computations.get(name, []):
        if one.opcode == "constant":
            match = _CONSTANT.match(f"{one.shape} constant({one.rest}")
            if match:
                yield int(match[1])
        for _, called in _CALLED.findall(one.rest):
            yield from _constants(computations, called)
