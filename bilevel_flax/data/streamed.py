"""Minibatches that are read when they are needed: a Grain pipeline as a finite sum.

A `grain.MapDataset` gives item i whenever it is asked for, so minibatch i is a pure function of i,
and a run that goes on from step t reads what it would have read: nothing of the pipeline belongs
into a checkpoint but the sampler's three numbers and the step.
"""

from __future__ import annotations

import collections
import operator
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bilevel_flax.data.finite_sum import FiniteSum

_CACHED_BYTES = 64 * 2**20


class Streamed:
    """Stands for an array [num_batches, batch_size, ...] of which minibatches are read on demand.

    Attributes:
        shape: of all of it.
        dtype: of its entries.
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        shape: tuple[int, ...],
        dtype: Any,
        rest: tuple = (),
    ):
        self._read, self._rest = read, rest
        self.shape, self.dtype = shape, np.dtype(dtype)

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """What all of it would take in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Minibatches (an array), or with a leading `:` a part of each (still unread)."""
        if isinstance(key, tuple) and key and key[0] == slice(None):
            if self._rest:
                raise IndexError("a part of a part of streamed minibatches: cut once")
            cut = np.broadcast_to(np.empty((), self.dtype), self.shape)[key].shape
            return Streamed(self._read, cut, self.dtype, key[1:])
        return self.take(np.arange(len(self))[key])

    def take(self, indices: Any, axis: int = 0, out: Any = None, mode: str = "raise") -> np.ndarray:
        """As `numpy.take` along the first axis, which calls it."""
        if axis != 0 or out is not None or mode != "raise":
            raise ValueError("streamed minibatches can be taken along axis 0 only")
        indices = np.asarray(indices)
        rows = np.empty((indices.size, *self.shape[1:]), self.dtype)
        for row, i in zip(rows, indices.reshape(-1).tolist(), strict=True):
            row[...] = self._read(i)[self._rest]
        return rows.reshape(*indices.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return self.take(np.arange(len(self))).astype(dtype or self.dtype, copy=False)


def streamed(dataset: Any, num_batches: int | None = None) -> FiniteSum:
    """A finite sum whose minibatches come out of a Grain pipeline when they are needed.

    Args:
        dataset: a `grain.MapDataset` of minibatches (its last step is `.batch(...)`): dicts of
            arrays that agree in their leading length. The last may be shorter; it is padded with
            its own examples and marked by a mask, as by `partition`. Or it is padded already, and
            all have a mask of their examples ("example_mask", or "mask" with a number for each).
        num_batches: how many of them there are in the sum; None: the dataset's own number. A
            repeated dataset has no end and needs it.

    Returns:
        As `partition` gives it, but for `index`, with leaves that read on demand.

    Raises:
        TypeError: no length or items, `num_batches` is no integer, or an item is no dict.
        ValueError: no minibatches, an endless dataset without `num_batches`, an item without
            arrays, or (when it is read) one that is not as long as the first and not the last.

    Example:
        >>> import grain, numpy as np
        >>> numbers = grain.MapDataset.range(6).map(lambda i: {"x": np.float32(i)})
        >>> side = streamed(numbers.batch(2))
        >>> side.num_batches, side.batches["x"][2].tolist()
        (3, [4.0, 5.0])
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"dataset must have __len__ and __getitem__, got {type(dataset).__name__}: "
            "use a grain.MapDataset rather than an IterDataset"
        )
    try:
        count = len(dataset) if num_batches is None else operator.index(num_batches)
    except TypeError:
        raise TypeError(f"num_batches must be an integer, got {num_batches!r}") from None
    if num_batches is None and count >= 2**31:
        raise ValueError("dataset has no end: say how many minibatches with num_batches=...")
    if count < 1:
        raise ValueError(f"dataset has {count} minibatches: nothing to train on")
    first = dataset[0]
    if not isinstance(first, dict):
        raise TypeError(f"dataset[0] must be a dict of arrays, got {type(first).__name__}")
    leaves, structure = jax.tree.flatten(first)
    size, mask = _length(leaves, 0), _mask_of_examples(first)
    read = _Reader(dataset, count, first, mask)
    last = read.examples(count - 1)
    batches = jax.tree.unflatten(
        structure,
        [
            Streamed(
                lambda i, number=number: read(i)[number],
                (count, *np.shape(leaf)),
                np.asarray(leaf).dtype,
            )
            for number, leaf in enumerate(leaves)
        ],
    )
    counts = np.full(count, size)
    counts[-1] = last
    if last < size and mask is None:
        mask = (np.arange(size) < counts[:, None]).astype(np.float32)
        batches["example_mask" if "mask" in first else "mask"] = mask
    num_samples = int(counts.sum())
    weights = (counts / num_samples).astype(np.float32)
    return FiniteSum(batches, weights, num_samples, count, size, streamed=True)


def _mask_of_examples(first: dict[str, Any]) -> str | None:
    """The name of the mask that minibatches bring along, as `minibatches.example_mask` has it."""
    if "example_mask" in first:
        return "example_mask"
    return "mask" if np.ndim(first.get("mask", [[]])) == 1 else None


def _length(leaves: list, i: int) -> int:
    """How many examples minibatch i has."""
    shapes = [np.shape(leaf) for leaf in leaves]
    if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"dataset[{i}] holds arrays of shapes {shapes}: they must agree in a leading length; "
            "end the pipeline with .batch(...)"
        )
    return shapes[0][0]


class _Reader:
    """Minibatch i, as a list of leaves; the last ones are kept, for each leaf asks on its own."""

    def __init__(self, dataset: Any, count: int, first: dict[str, Any], mask: str | None):
        self._dataset, self._count, self._mask = dataset, count, mask
        leaves, self._structure = jax.tree.flatten(first)
        self._kinds = [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves]
        self._size = _length(leaves, 0)
        nbytes = sum(np.asarray(leaf).nbytes for leaf in leaves)
        self._cache: collections.OrderedDict[int, list[np.ndarray]] = collections.OrderedDict()
        self._max_cached = max(2, _CACHED_BYTES // max(1, nbytes))
        self._lock = threading.Lock()

    def __call__(self, i: int) -> list[np.ndarray]:
        with self._lock:
            if i not in self._cache:
                self._cache[i] = self._padded(i)
                if len(self._cache) > self._max_cached:
                    self._cache.popitem(last=False)
            return self._cache[i]

    def examples(self, i: int) -> int:
        """How many real ones minibatch i has."""
        minibatch = self._checked(i)
        if self._mask is None:
            return _length(jax.tree.leaves(minibatch), i)
        return int(np.sum(np.asarray(minibatch[self._mask]) > 0))

    def _checked(self, i: int) -> dict[str, Any]:
        """Minibatch i, if it is like the first; the last may be short, or partly masked."""
        minibatch = self._dataset[i]
        leaves, structure = jax.tree.flatten(minibatch)
        if structure != self._structure:
            raise ValueError(
                f"dataset[{i}] is {structure} and dataset[0] {self._structure}: minibatches must "
                "agree in their entries"
            )
        for leaf, (shape, dtype) in zip(leaves, self._kinds, strict=True):
            given, own = np.asarray(leaf), np.shape(leaf)
            if own[1:] != shape[1:] or not np.can_cast(given.dtype, dtype, "same_kind"):
                raise ValueError(
                    f"dataset[{i}] has a {given.dtype}{list(own)} where dataset[0] has a "
                    f"{dtype}{list(shape)}: minibatches must agree in shapes and dtypes"
                )
        length, is_last = _length(leaves, i), i == self._count - 1
        is_short = length < self._size and not (is_last and self._mask is None)
        if not length or length > self._size or is_short:
            also = "" if self._mask is None else ", and none where all have a mask"
            raise ValueError(
                f"dataset[{i}] has {length} examples and dataset[0] has {self._size}: only the "
                f"last minibatch may be shorter{also}; end the pipeline with "
                ".batch(..., drop_remainder=True)"
            )
        if self._mask and not is_last and not np.all(np.asarray(minibatch[self._mask]) > 0):
            raise ValueError(
                f'dataset[{i}]["{self._mask}"] marks padding: only the last minibatch may have any'
            )
        return minibatch

    def _padded(self, i: int) -> list[np.ndarray]:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(self._checked(i))]
        length = len(leaves[0])
        again = np.resize(np.arange(length), self._size)
        return leaves if length == self._size else [leaf[again] for leaf in leaves]
