"""A finite sum: examples permuted once and cut into minibatches of one size.

The loss is  G = sum_i w_i G_i  over N minibatches, with w_i the minibatch's share of the samples.
The last one is padded when the batch size does not divide the number of samples; `mask` marks what
is real, so that w_i times the masked mean of minibatch i still sums to the mean over all samples.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bilevel_flax.data import draws

_STREAM = 1  # keeps the permutation apart from the sampler's and the label noise's draws
_RESERVED = ("index", "example_mask")


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteSum:
    """Minibatches that lie contiguously in memory: minibatch `i` is `leaf[i]`, a view.

    Attributes:
        batches: the user's arrays, leaves [num_batches, batch_size, ...]; `"index"` int32
            [num_batches, batch_size], each example's position in the original arrays; and, only
            when the last minibatch is ragged, `"mask"` float32 [num_batches, batch_size], 1 for an
            example and 0 for padding (`"example_mask"` where the user has a `"mask"`, of tokens
            say). Padding repeats examples of the same minibatch, index included.
        weights: float32 [num_batches], each minibatch's share of the samples; they sum to 1.
        num_samples: examples, padding not counted.
        num_batches: minibatches, N.
        batch_size: examples in a minibatch, padding counted.
        streamed: whether minibatches are read when they are needed (`data.streamed`).

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> parts = bf.data.partition({"x": np.arange(5)}, batch_size=2)
        >>> parts.num_batches, parts.num_samples, float(parts.weights.sum())
        (3, 5, 1.0)
    """

    batches: dict[str, Any]
    weights: np.ndarray
    num_samples: int
    num_batches: int
    batch_size: int
    streamed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all minibatches together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.batches))

    @property
    def ragged(self) -> bool:
        """Whether the last minibatch is padded."""
        return self.num_samples < self.num_batches * self.batch_size


def partition(
    arrays: Mapping[str, Any], batch_size: int, *, seed: int = 0, shuffle: bool = True
) -> FiniteSum:
    """Permutes examples once and cuts them into minibatches.

    Args:
        arrays: a dict (of dicts) of arrays that agree in their leading length n.
        batch_size: examples a minibatch, 1 .. n.
        seed: what the permutation is drawn from, non-negative.
        shuffle: False keeps the order as it is.

    Returns:
        A `FiniteSum` of ceil(n / batch_size) minibatches.

    Raises:
        TypeError: `arrays` is no dict, a leaf is no numeric array, `batch_size` is no integer.
        ValueError: leading lengths differ, there are no examples, `batch_size` is out of range, or
            a reserved name is taken: "index", "example_mask", a "mask" with one number an example.

    Example:
        >>> import numpy as np
        >>> parts = partition({"x": np.arange(5.0)}, 2, shuffle=False)
        >>> parts.batches["x"].tolist(), parts.batches["mask"].tolist()
        ([[0.0, 1.0], [2.0, 3.0], [4.0, 4.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    """
    arrays = _checked(arrays)
    n = len(jax.tree.leaves(arrays)[0])
    batch_size = _checked_batch_size(batch_size, n)
    seed = draws.check_seed(seed)

    num_batches = -(-n // batch_size)
    order = draws.permutation(n, seed, _STREAM) if shuffle else np.arange(n)
    counts = np.full(num_batches, batch_size)
    counts[-1] = n - (num_batches - 1) * batch_size
    last = order[n - counts[-1] :]
    padding = np.resize(last, batch_size - counts[-1])
    order = np.concatenate([order, padding])

    def cut(leaf: np.ndarray) -> np.ndarray:
        return leaf[order].reshape(num_batches, batch_size, *leaf.shape[1:])

    batches = {**jax.tree.map(cut, arrays), "index": cut(np.arange(n, dtype=np.int32))}
    if len(padding):
        mask = (np.arange(batch_size) < counts[:, None]).astype(np.float32)
        batches["example_mask" if "mask" in arrays else "mask"] = mask
    weights = (counts / n).astype(np.float32)
    return FiniteSum(batches, weights, n, num_batches, batch_size)


def gather(finite_sum: FiniteSum, ids: np.ndarray) -> dict[str, Any]:
    """Copies the minibatches `ids` out, on the host.

    Args:
        finite_sum: where from.
        ids: integers of any shape S, each in [0, num_batches).

    Returns:
        As `finite_sum.batches`, leaves `[*S, batch_size, ...]`.

    Raises:
        ValueError: an id is out of range.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> parts = bf.data.partition({"x": np.arange(8)}, batch_size=2)
        >>> bf.data.gather(parts, np.array([3, 0]))["x"].shape
        (2, 2)
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= finite_sum.num_batches):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"ids must lie in [0, {finite_sum.num_batches}) for {finite_sum.num_batches} "
            f"minibatches, got {wrong}: make them with Sampler({finite_sum.num_batches}, ...)"
        )
    return jax.tree.map(lambda leaf: np.take(leaf, ids, axis=0), finite_sum.batches)


def _checked(arrays: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"arrays must be a dict of arrays, got {type(arrays).__name__}: "
            'pass {"image": images, "label": labels}'
        )
    taken = [name for name in _RESERVED if name in arrays]
    if np.ndim(arrays.get("mask", [[]])) == 1:
        taken.append("mask")  # one number an example would be taken for the mask of padding
    if taken:
        raise ValueError(
            f'arrays has the key "{taken[0]}", a name that partition fills in itself: rename it'
        )
    arrays = {name: jax.tree.map(np.asarray, value) for name, value in arrays.items()}
    leaves = [
        ("/".join(str(getattr(k, "key", k)) for k in path), leaf)
        for path, leaf in jax.tree.leaves_with_path(arrays)
    ]
    if not leaves:
        raise ValueError("arrays holds no array: pass at least one, with a row an example")
    for name, leaf in leaves:
        if leaf.ndim == 0 or leaf.dtype.kind in "OSU":
            what = "a scalar" if leaf.ndim == 0 else "no array of numbers"
            raise TypeError(f'arrays["{name}"] is {what}: every leaf needs a row an example')
    lengths = {name: len(leaf) for name, leaf in leaves}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f'"{name}" has {length}' for name, length in lengths.items())
        raise ValueError(f"arrays must agree in their leading length, but {listed}")
    if leaves[0][1].shape[0] == 0:
        raise ValueError("arrays holds no examples (leading length 0): nothing to partition")
    return arrays


def _checked_batch_size(batch_size: int, n: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)):
        raise TypeError(f"batch_size must be an integer, got {batch_size!r}")
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size must lie between 1 and the number of examples, n = {n}, got {batch_size}: "
            f"{'use 1 or more' if batch_size < 1 else f'use {n} or fewer'}"
        )
    return int(batch_size)


def subsample(side: FiniteSum, max_batches: int) -> FiniteSum:
    """At most `max_batches` of the minibatches, evenly spaced: always the same ones.

    Args:
        side: all of them.
        max_batches: >= 1. A padded last minibatch is among them only if all are.

    Returns:
        A `FiniteSum` of its own, whose shares sum to 1.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> parts = bf.data.partition({"x": np.arange(8)}, batch_size=2)
        >>> bf.data.subsample(parts, 2).num_batches
        2
    """
    if side.num_batches <= max_batches:
        return side
    # A padded minibatch would count its examples twice.
    ids = np.linspace(0, side.num_batches - 1 - side.ragged, max_batches).astype(int)
    return FiniteSum(
        jax.tree.map(lambda leaf: leaf[ids], side.batches),
        side.weights[ids] / side.weights[ids].sum(),
        len(ids) * side.batch_size,
        len(ids),
        side.batch_size,
    )
