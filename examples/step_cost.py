"""What one step costs, alone: seconds, and the memory that XLA reserves for temporaries.

They come beside the arguments, which for a bilevel step hold z and v: `total_bytes` has both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


def step_cost(
    step: Callable[[Any, Any], Any], carry: Any, batch: Any, *, timed: int = 50, repeats: int = 5
) -> dict[str, Any]:
    """Seconds and bytes of one step; the same minibatch over and over.

    Args:
        step: `step(carry, batch) -> carry`.
        carry: what a run keeps: parameters, optimiser states, tables.
        batch: a minibatch.
        timed: steps in a measured chunk.
        repeats: chunks; the fastest counts.
    """

    def several(carry, batch):
        return jax.lax.fori_loop(0, timed, lambda _, carry: step(carry, batch), carry)

    one = jax.jit(step, donate_argnums=0).lower(carry, batch).compile()
    memory: Any = one.memory_analysis()
    result = {
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(carry)),
    }
    result["total_bytes"] = sum(result.values())
    if repeats:
        many = jax.jit(several).lower(carry, batch).compile()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(many(carry, batch))
            seconds.append((time.perf_counter() - began) / timed)
        result["seconds_per_step"] = min(seconds)
    return result


def line(result: dict[str, Any]) -> str:
    """For a person."""
    parts = [f"test error {result['test_error']:.2%}"] if "test_error" in result else []
    if "seconds_per_step" in result:
        parts.append(f"{1e3 * result['seconds_per_step']:.2f} ms a step")
    for name in ("temporary", "state", "total"):
        parts.append(f"{name} {result[f'{name}_bytes'] / 1e6:.2f} MB")
    return ", ".join(parts)
