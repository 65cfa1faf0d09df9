"""Inputs and labels out of arrays, Hugging Face `datasets`, TFDS data sources and Grain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel_flax.data import check_labels

_MOST_CLASSES = 2**31 - 1  # labels become int32


def read(name: str, source: Any, inputs: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """The inputs [n, ...] and the labels int32 [n] of a data set, in memory.

    Args:
        name: what errors call it.
        source: a dict of arrays, (inputs, labels), a Hugging Face `Dataset`, or anything with a
            length whose elements are dicts: a TFDS data source, a Grain `MapDataset`.
        inputs: the key, or column, of the inputs.
        label: that of the labels.

    Raises:
        TypeError: it is none of these; labels are no integers, or inputs no real numbers.
        ValueError: a key is missing, there are no examples, the lengths differ, or an input is not
            finite.
    """
    if isinstance(source, tuple) and len(source) == 2:
        pair = source
    elif isinstance(source, Mapping):
        pair = (_column(name, source, inputs), _column(name, source, label))
    elif hasattr(source, "column_names"):  # Hugging Face: whole columns, decoded as it likes
        names = getattr(source, "column_names")  # noqa: B009  no stub of it here
        columns = {key: source[key] for key in names if key in (inputs, label)}
        pair = (_column(name, columns, inputs), _column(name, columns, label))
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        rows = [source[i] for i in range(len(source))]
        if rows and not isinstance(rows[0], Mapping):
            raise TypeError(f"{name} holds {type(rows[0]).__name__}, not dicts of features")
        pair = tuple([_column(name, row, key) for row in rows] for key in (inputs, label))
    else:
        raise TypeError(
            f"{name} is {type(source).__name__}: pass a dict of arrays, (inputs, labels), a "
            "datasets.Dataset, a TFDS data source or a Grain MapDataset"
        )
    values, labels = np.asarray(pair[0]), np.asarray(pair[1])
    if values.dtype == object or not len(values):
        why = "no examples" if not len(values) else "inputs of different shapes"
        raise ValueError(f'{name} has {why}: its "{inputs}" must be one array [n, ...], n >= 1')
    if len(values) != len(labels):
        raise ValueError(f"{name} has {len(values)} inputs and {len(labels)} labels")
    _real_numbers(f'{name}\'s "{inputs}"', values)
    top = int(labels.max(initial=0)) if labels.dtype.kind in "iu" else 0
    return values, check_labels(labels, min(top + 1, _MOST_CLASSES), f"{name}'s labels")


def _real_numbers(name: str, values: np.ndarray) -> None:
    """Raises unless all entries are real numbers, and finite."""
    if not jnp.issubdtype(values.dtype, jnp.number) and values.dtype != bool:
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}: encode them first")
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}: split them into two")
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise ValueError(
            f"{name} has {int((~finite).sum())} rows that are not finite, the first at "
            f"{int(finite.argmin())}: mend them or leave them out"
        )


def _column(name: str, columns: Mapping[str, Any], key: str) -> Any:
    if key not in columns:
        raise ValueError(
            f'{name} has no "{key}", it has {", ".join(map(repr, columns)) or "nothing"}: name its '
            "columns with inputs= and label="
        )
    return columns[key]


def positions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where each row of `first` stands in `second`, byte for byte: int [n]; -1: nowhere."""
    if first.shape[1:] != second.shape[1:] or first.dtype != second.dtype:
        return np.full(len(first), -1)
    known = {row.tobytes(): i for i, row in enumerate(second)}
    return np.fromiter((known.get(row.tobytes(), -1) for row in first), int, len(first))
