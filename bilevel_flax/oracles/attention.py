"""Attention by fused kernels, in losses that are differentiated twice.

The kernels compute values and first gradients; second order comes from `chunked_attention`, whose
memory is linear in the length: one chunk of queries at a time, recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.oracles.kernels import WithReference, with_reference

CHUNK = 256  # queries; a chunk's logits are [batch, heads, chunk, keys]


def chunked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, a chunk of the queries at a time; derivatives of all orders.

    Args:
        query: [batch, T, N, H] or [T, N, H].
        key: [batch, S, K, H] or [S, K, H], with K dividing N.
        value: as `key`; H may be another.
        bias: broadcastable to [batch, N, T, S], added to the logits.
        mask: bool, likewise; False: left out.
        scale: of the logits; None: 1/√H.
        is_causal: query i sees the keys up to i.
        query_seq_lengths: int32 [batch].
        key_value_seq_lengths: int32 [batch].
        local_window_size: (left, right), or one number for both.
        segment_ids: integers ([batch, T], [batch, S]); a query sees the keys of its segment.
        chunk: queries at a time.

    Returns:
        The shape of `query`, with `value`'s H, and its dtype.

    Raises:
        TypeError: a mask that is not of booleans; a window that is no number or pair of numbers.
        ValueError: shapes that do not fit, by name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))
        >>> ours = chunked_attention(q, k, v, is_causal=True, chunk=4)
        >>> theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        >>> bool(jnp.allclose(ours, theirs, atol=1e-6))
        True
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be an integer >= 1, queries at a time")
    _check(query, key, value, bias, mask, local_window_size)
    shape = *query.shape[:-1], value.shape[-1]
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
        if segment_ids is not None:
            segment_ids = segment_ids[0][None], segment_ids[1][None]
    length, keys = query.shape[1], key.shape[1]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    heads, width = key.shape[2], query.shape[3]
    factor = width**-0.5 if scale is None else scale
    window = local_window_size
    left, right = window if isinstance(window, tuple) else (window, window)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    columns = jnp.arange(keys)[None]

    def by_chunk(array, axis):
        """[count, ...] along the queries' axis; None where it is the same for all of them."""
        if array is None or array.shape[axis] == 1 != length:
            return None
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, count * chunk - length)
        return jnp.stack(jnp.split(jnp.pad(array, pad), count, axis))

    def by_head(array):
        """[batch, K, N / K, ...] of a bias or a mask."""
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        grouped = (1, 1) if array.shape[1] == 1 else (heads, -1)
        return array.reshape(array.shape[0], *grouped, *array.shape[2:])

    whole = [None if array is None else by_head(array) for array in (bias, mask)]

    @jax.checkpoint
    def attend(start, query, bias, mask, segments):
        rows = start + jnp.arange(chunk)[:, None]
        seen = jnp.ones((chunk, keys), bool)
        if is_causal:
            seen &= columns <= rows
        if left is not None:
            seen &= columns >= rows - left
        if right is not None and not is_causal:
            seen &= columns <= rows + right
        seen = seen[None, None, None]
        if segments is not None and segment_ids is not None:
            same = segments[:, :, None] == segment_ids[1][:, None, :]
            seen = seen & same[:, None, None]
        if key_value_seq_lengths is not None:
            real = columns < key_value_seq_lengths[:, None]
            seen = seen & real[:, None, None, None]
        bias = whole[0] if bias is None else bias
        mask = whole[1] if mask is None else mask
        seen = seen if mask is None else seen & mask
        grouped = query.reshape(*query.shape[:2], heads, -1, width)
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=wide)
        logits = logits * factor if bias is None else logits * factor + bias
        # Finite, so that a row that sees nothing has a derivative.
        logits = jnp.where(seen, logits, 0.7 * float(jnp.finfo(jnp.float32).min))
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, value)
        out = out.reshape(*query.shape[:3], value.shape[3])
        if query_seq_lengths is None:
            return out
        return jnp.where((rows < query_seq_lengths[None]).T[:, :, None, None], out, 0)

    segments = None if segment_ids is None else by_chunk(segment_ids[0], 1)
    cut = by_chunk(query, 1), *(by_chunk(array, 3) for array in whole), segments
    starts = jnp.arange(count, dtype=jnp.int32) * chunk
    _, out = jax.lax.scan(lambda _, xs: (None, attend(*xs)), None, (starts, *cut))
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], count * chunk, *shape[-2:])
    return out[:, :length].reshape(shape)


def _check(query, key, value, bias, mask, window) -> None:
    """Raises on what would be broadcast, or computed, as something else."""
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    ranks = {query.ndim, key.ndim, value.ndim}
    if ranks not in ({3}, {4}) or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"{shapes}: they must be [batch, T, N, H], [batch, S, K, H] and [batch, S, K, any], or "
            "all three without the batch"
        )
    fits = query.shape[:-3] == key.shape[:-3] and query.shape[-1] == key.shape[-1]
    if not fits or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{shapes}: query and key must have one batch and one width H, and the number of key "
            "heads must divide that of the queries; axes are [batch, length, heads, width]"
        )
    batch = query.shape[0] if query.ndim == 4 else 1
    logits = batch, query.shape[-2], query.shape[-3], key.shape[-3]
    for name, array in (("bias", bias), ("mask", mask)):
        if array is None:
            continue
        given = (1,) * (4 - array.ndim) + array.shape
        if len(given) != 4 or any(a not in (1, b) for a, b in zip(given, logits, strict=True)):
            raise ValueError(
                f"{name} has shape {array.shape}, which does not broadcast to [batch, N, T, S] = "
                f"{logits}: a mask of keys [batch, S] is mask[:, None, None, :]"
            )
    if mask is not None and mask.dtype != bool:
        raise TypeError(
            f"mask has dtype {mask.dtype}, but must be bool, False where a key is left out: pass "
            "mask.astype(bool) for ones and zeros; numbers to be added to the logits are a bias"
        )
    pair = window if isinstance(window, tuple) else (window, window)
    number = lambda n: n is None or (isinstance(n, (int, np.integer)) and not isinstance(n, bool))
    if len(pair) != 2 or not all(map(number, pair)):
        raise TypeError(
            f"local_window_size={window!r} must be an integer or a tuple (left, right) of integers"
        )


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **settings: Any
) -> jax.Array:
    """`jax.nn.dot_product_attention` on cuDNN's flash attention, differentiable twice.

    Args:
        query: [batch, T, N, H].
        key: [batch, S, K, H].
        value: as `key`.
        *args: as `jax.nn.dot_product_attention`.
        **settings: the same by keyword; `implementation` ("cudnn" by default), and `chunk` of
            `chunked_attention`.

    Returns:
        The shape and dtype of `query`.

    Example:
        >>> import jax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 4, 8))
        >>> dot_product_attention(q, k, v, is_causal=True, implementation="xla").shape
        (2, 6, 4, 8)
    """
    implementation, chunk = settings.pop("implementation", "cudnn"), settings.pop("chunk", CHUNK)
    return _dot_product(implementation, chunk)(query, key, value, *args, **settings)


@functools.lru_cache
def _dot_product(implementation: str, chunk: int) -> WithReference:
    attention: Any = jax.nn.dot_product_attention
    kernel = functools.partial(attention, implementation=implementation)
    return with_reference(kernel, functools.partial(chunked_attention, chunk=chunk))


def pallas_attention(
    kernel: Callable[..., jax.Array], *, scale: float = 1.0, chunk: int = CHUNK, **settings: Any
) -> WithReference:
    """A Pallas attention kernel (splash or flash), differentiable twice.

    Args:
        kernel: `kernel(query, key, value[, segment_ids])` on arrays [N, T, H], [K, S, H] and
            [K, S, H] (splash attention; [S, H] for one head of keys), or
            `kernel(query, key, value[, ab[, segment_ids]])` with a batch in front (flash
            attention; `ab` is a bias); `segment_ids` has fields `q` and `kv`.
        scale: that the kernel multiplies its logits by; Pallas's leave it to the caller.
        chunk: as `chunked_attention`.
        **settings: what the kernel's mask is made of, as `chunked_attention`: `is_causal`,
            `local_window_size`, `mask`.

    Returns:
        A function like `kernel`.

    Example:
        >>> from jax.experimental.pallas.ops.tpu import flash_attention
        >>> kernel = functools.partial(flash_attention.flash_attention, causal=True)
        >>> attention = pallas_attention(kernel, is_causal=True)  # attention(q, k, v) on a TPU
    """

    def reference(query, key, value, *rest, ab=None, segment_ids=None):
        for given in rest:
            if hasattr(given, "kv"):
                segment_ids = given
            elif given is not None:
                ab = given
        if ab is not None:
            ab = ab * scale  # flash attention scales the sum of logits and bias
        if key.ndim < query.ndim:
            key, value = key[..., None, :, :], value[..., None, :, :]
        ids = None if segment_ids is None else (segment_ids.q, segment_ids.kv)
        q, k, v = (jnp.swapaxes(array, -3, -2) for array in (query, key, value))
        out = chunked_attention(q, k, v, ab, scale=scale, chunk=chunk, segment_ids=ids, **settings)
        return jnp.swapaxes(out, -3, -2)

    return with_reference(kernel, reference)
