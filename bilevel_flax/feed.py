"""The minibatches of a run as compiled chunks of updates want them: indexed on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bilevel_flax import data
from bilevel_flax.base import PyTree

_CHUNK_BYTES = 64 * 2**20  # of streamed data; two chunks wait while one computes


def minibatch(batches: PyTree, position: jax.Array) -> PyTree:
    """One minibatch (a contiguous slice), or K of them with a leading [K] (a gather)."""
    if position.ndim == 0:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, position, keepdims=False), batches
        )
    return jax.tree.map(lambda leaf: leaf[position], batches)


class Feed:
    """The minibatches of one side, on the device at once or streamed in aligned chunks.

    Attributes:
        batches: what the compiled chunk indexes, leaves [rows, batch, ...].
    """

    def __init__(
        self, finite_sum: data.FiniteSum, sampler: data.Sampler, on_device: bool, most_steps: int
    ):
        self._sum, self._sampler, self._on_device = finite_sum, sampler, on_device
        self.batches: PyTree = None
        self._chunk = -1
        self._stream: Any = None
        per_step = sampler.per_step * finite_sum.nbytes // finite_sum.num_batches
        self.capacity = int(np.clip(_CHUNK_BYTES // max(1, per_step), 1, most_steps))
        if on_device:
            self.batches = jax.device_put(finite_sum.batches)

    def seek(self, step: int) -> int:
        """Makes the minibatches of update `step` available; returns the first update without."""
        if self._on_device:
            return step + 2**30
        chunk = step // self.capacity
        if chunk != self._chunk:
            if self._stream is None or chunk != self._chunk + 1:
                self.close()
                self._stream = data.chunks(self._sum, self._aligned(chunk))
            self.batches = None  # frees the chunk before
            self.batches = next(self._stream)
            self._chunk = chunk
        return (chunk + 1) * self.capacity

    def _aligned(self, chunk: int) -> Iterator[np.ndarray]:
        while True:
            yield self._sampler.ids(chunk * self.capacity, (chunk + 1) * self.capacity)
            chunk += 1

    def positions(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of `batches`, ids in the partition) of the updates start .. stop - 1."""
        ids = self._sampler.ids(start, stop)
        if self._on_device:
            return ids, ids
        first = start - self._chunk * self.capacity
        return np.arange(first, first + stop - start, dtype=np.int32), ids

    def close(self) -> None:
        """Ends the background thread, if there is one."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
