"""The minibatches of a run as compiled chunks of updates want them: indexed on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bilevel_flax import data, deprecated
from bilevel_flax.base import PyTree
from bilevel_flax.sharding import Layout

_CHUNK_BYTES = 64 * 2**20  # of streamed data; two chunks wait while one computes
_CHUNK_READ = 50  # minibatches, where each is first read from a file


def minibatch(batches: PyTree, position: jax.Array) -> PyTree:
    """One minibatch (a contiguous slice), or K of them with a leading [K] (a gather)."""
    if position.ndim == 0:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, position, keepdims=False), batches
        )
    return jax.tree.map(lambda leaf: leaf[position], batches)


class DeviceFeed:
    """The minibatches of one side, on the device at once or streamed in aligned chunks.

    Args:
        finite_sum: the data, on the host.
        sampler: which minibatch comes when.
        on_device: at once, or streamed.
        most_steps: in a chunk of updates.
        layout: of devices; None: one device.

    Attributes:
        batches: what the compiled chunk indexes, leaves [rows, batch, ...].
    """

    def __init__(
        self,
        finite_sum: data.FiniteSum,
        sampler: data.Sampler,
        on_device: bool,
        most_steps: int,
        layout: Layout | None = None,
    ):
        self._sum, self._sampler, self._on_device = finite_sum, sampler, on_device
        self._layout = layout
        self.batches: PyTree = None
        self._chunk = -1
        self._stream: Any = None
        per_step = sampler.per_step * finite_sum.nbytes // finite_sum.num_batches
        if finite_sum.streamed:
            most_steps = min(most_steps, _CHUNK_READ)
        self.capacity = int(np.clip(_CHUNK_BYTES // max(1, per_step), 1, most_steps))
        if on_device:
            self.batches = self.placed()

    def placed(self, ids: np.ndarray | None = None) -> PyTree:
        """The minibatches `ids`, or all, on the devices; leaves [*ids.shape, batch, ...]."""
        if self._layout is not None:
            return self._layout.place_batches(self._sum.batches, ids)
        if ids is None:
            return jax.device_put(jax.tree.map(np.asarray, self._sum.batches))
        return jax.device_put(data.gather(self._sum, ids))

    def seek(self, step: int) -> int:
        """Makes the minibatches of update `step` available; returns the first update without."""
        if self._on_device:
            return step + 2**30
        chunk = step // self.capacity
        if chunk != self._chunk:
            if self._stream is None or chunk != self._chunk + 1:
                self.close()
                self._stream = data.Prefetcher(self.placed, self._aligned(chunk))
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


__getattr__ = deprecated.names(__name__)
