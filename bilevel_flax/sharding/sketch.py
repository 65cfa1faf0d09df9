"""A vector's length from a few numbers that add up over devices.

The adjoint's residual ‖Hv + ∇₁F‖ / ‖∇₁F‖ of a method that reduces D_v = Hv + ∇₁F alone lacks ‖∇₁F‖,
and v's first steps ‖Hv‖, and reducing either would cost the parameters' bytes once more. So each is
added up into a few buckets, each entry with a random sign: a linear map S with E‖S g‖² = ‖g‖²,
whatever g is, and a relative standard deviation of ‖S g‖² of about √(2 / buckets).

References:
    M. Charikar, K. Chen, M. Farach-Colton. Finding frequent items in data streams. ICALP 2002.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel_flax.base import PyTree
from bilevel_flax.tree import is_inexact

_MIN_BUCKETS, _MAX_BUCKETS = 128, 4096
_SMALL = 256  # a vector of no more entries is handed over as it is: its length is then exact
_ENTRIES_PER_BUCKET = 64  # the sketch moves less than 2 % of a large vector's own bytes
_SEED = 0x9E3779B1


def sketch(tree: PyTree, coarser: int = 1) -> jax.Array:
    """S g: float32 [buckets], linear in the float leaves of `tree`; always the same S.

    Args:
        tree: g.
        coarser: so many times fewer buckets, where g is longer than a few.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    size = sum(leaf.size for leaf in leaves)
    flat = [leaf.reshape(-1).astype(jnp.float32) for leaf in leaves]
    if size <= _SMALL:
        return jnp.concatenate(flat)
    buckets = min(max(_MIN_BUCKETS, size // _ENTRIES_PER_BUCKET), _MAX_BUCKETS) // coarser
    total, start = jnp.zeros(buckets, jnp.float32), 0
    for entries in flat:
        signed = entries * _signs(start, entries.size)
        padded = jnp.pad(signed, (0, -entries.size % buckets))
        # Neighbours, which tend to be alike, go to different buckets.
        total = total + padded.reshape(-1, buckets).sum(0)
        start += entries.size
    return total


def _signs(start: int, count: int) -> jax.Array:
    """±1 for each position: a bit of a mixing hash (xxHash's finaliser)."""
    word = jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(start % 2**32)
    word = word ^ jnp.uint32(_SEED)
    for shift, factor in ((15, 0x85EBCA77), (13, 0xC2B2AE3D)):
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    word = word ^ (word >> 16)
    return 1.0 - 2.0 * (word & 1).astype(jnp.float32)
