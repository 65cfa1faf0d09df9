"""Anything with a length and items (a Grain MapDataset, a TFDS data source, a list) -> arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INFINITE = 2**31  # a repeated grain.MapDataset reports sys.maxsize


def from_grain(source: Any, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads a random-access source once into arrays, as `partition` takes them.

    Args:
      source: has `__len__` and `__getitem__`, items are dicts of numbers or arrays: a
        `grain.MapDataset`, a `grain.sources` data source, `tfds.data_source`, a list.
      keys: which entries; None: all of the first item's.

    Returns:
      A dict of arrays with leading length `len(source)`.

    Raises:
      TypeError: no length, or an item is no dict.
      ValueError: empty, endless, a key is missing, or a shape changes; names the item.

    Example:
      >>> from_grain([{"x": 1.0, "y": 0}, {"x": 2.0, "y": 1}], keys=["x"])["x"].tolist()
      [1.0, 2.0]
    """
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"source must have __len__ and __getitem__, got {type(source).__name__}: "
            "use a grain.MapDataset rather than an IterDataset"
        )
    n = len(source)
    if n == 0:
        raise ValueError("source has no items")
    if n >= _INFINITE:
        raise ValueError(f"source has {n} items: leave .repeat() out, the sampler makes the epochs")

    arrays: dict[str, np.ndarray] = {}
    for i in range(n):
        item = source[i]
        if not isinstance(item, Mapping):
            raise TypeError(f"source[{i}] must be a dict, got {type(item).__name__}")
        if i == 0:
            keys = list(item) if keys is None else list(keys)
        for key in keys or ():
            if key not in item:
                raise ValueError(f'source[{i}] has no key "{key}", only {sorted(item)}')
            value = np.asarray(item[key])
            if value.dtype.kind in "OSU":
                raise ValueError(
                    f'source[{i}]["{key}"] is no number: name the others with keys=[...]'
                )
            if i == 0:
                arrays[key] = np.empty((n, *value.shape), value.dtype)
            if value.shape != arrays[key].shape[1:]:
                raise ValueError(
                    f'source[{i}]["{key}"] has shape {list(value.shape)}, earlier items '
                    f"{list(arrays[key].shape[1:])}: resize or pad them to one shape"
                )
            if not np.can_cast(value.dtype, arrays[key].dtype, "safe"):
                raise ValueError(
                    f'source[{i}]["{key}"] is {value.dtype}, the first item {arrays[key].dtype}'
                )
            arrays[key][i] = value
    return arrays
