"""Where a table lies, and whether it fits: rows go in and out, the table itself never moves.

A table may lie in the host's memory beside an accelerator: then a step moves one row each way,
and JAX's types tell the two memories apart (`float32<host>[N, p]`), so that an operation which
would move more is an error at trace time.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from bilevel_flax.base import PyTree

_log = logging.getLogger(__name__)

DEVICE, HOST = "device", "pinned_host"
MEMORIES = (DEVICE, HOST)


def zeros(shape: tuple[int, ...], dtype: Any, memory: str, traced: bool = False) -> jax.Array:
    """A table of zeros in "device" or "pinned_host" memory.

    Args:
        shape: [num_rows, ...].
        dtype: of its entries.
        memory: one of `MEMORIES`.
        traced: whether this is part of a jitted function.
    """
    if memory == DEVICE:
        return jnp.zeros(shape, dtype)
    if traced:
        return jax.device_put(jnp.zeros(shape, dtype), jax.memory.Space.Host)
    # From NumPy's zeros: it may not fit on the device even for a moment.
    return jax.device_put(np.zeros(shape, dtype), _host_sharding())


def write_row(table: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
    """The table [N, ...] with `row` at `position`, in place where the table is donated."""
    row = row[None]
    if _on_host(table):
        row = jax.device_put(row, jax.memory.Space.Host)
    return lax.dynamic_update_slice_in_dim(table, row, position, 0)


def read_row(table: jax.Array, position: jax.Array) -> jax.Array:
    """Row `position` of the table, on the device."""
    row = lax.dynamic_slice_in_dim(table, position, 1, 0)
    if _on_host(table):
        row = jax.device_put(row, jax.memory.Space.Device)
    return row[0]


def check_memory(memory: str) -> None:
    """Raises unless JAX's device can reach that memory.

    Raises:
        ValueError: names the memories that there are.
    """
    kinds = memory_kinds()
    if memory == HOST and HOST not in kinds:
        raise ValueError(
            f'table_placement="{HOST}", but {jax.local_devices()[0]} reaches only '
            f"{', '.join(kinds)}: leave table_placement out, or halve the tables with "
            "table_dtype=jnp.bfloat16"
        )


def memory_kinds() -> list[str]:
    """The kinds of memory that JAX's first local device can reach."""
    return sorted(memory.kind for memory in jax.local_devices()[0].addressable_memories())


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is being traced."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def check_size(
    tables: dict[str, PyTree], max_bytes: int | None, memory: str = DEVICE, traced: bool = False
) -> None:
    """Logs the size of tables and refuses what does not fit; before they are made.

    Args:
        tables: by name; shapes suffice (`jax.eval_shape`).
        max_bytes: the limit; None: the memory in question, JAX's local devices' or the machine's.
            It is not applied while tracing, as the state may then be for other devices.
        memory: one of `MEMORIES`.
        traced: whether this is part of a jitted function.

    Raises:
        ValueError: the size, the limit, and the ways out.
    """
    sizes = {name: _num_bytes(table) for name, table in tables.items()}
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {_in_words(size)}" for name, size in sizes.items())
    _log.info("tables take %s of %s memory (%s)", _in_words(total), memory, parts)
    limit = max_bytes
    if limit is None and not traced:
        limit = _capacity(memory)
    if limit is not None and total > limit:
        given = "max_table_bytes" if max_bytes is not None else "the memory at hand"
        elsewhere = f'keep them in the host\'s memory (table_placement="{HOST}"), '
        raise ValueError(
            f"the tables take {_in_words(total)} and {given} is {_in_words(limit)}: store them in "
            f"half the space (table_dtype=jnp.bfloat16), {elsewhere if memory == DEVICE else ''}"
            "cut the data into fewer, larger minibatches, or take bf.srba, which keeps no table"
        )


def _host_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind=HOST)


def _on_host(table: Any) -> bool:
    return jax.typeof(table).memory_space == jax.memory.Space.Host


def _num_bytes(table: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(table))


def _in_words(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} GB"


def _capacity(memory: str) -> int | None:
    devices = jax.local_devices()
    if memory == HOST or devices[0].platform == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    stats = devices[0].memory_stats() or {}
    return stats["bytes_limit"] * len(devices) if "bytes_limit" in stats else None
