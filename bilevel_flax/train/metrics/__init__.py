"""Metric writers with the method names of clu's `MetricWriter`, without tensorflow.

Example:
    >>> import contextlib, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with contextlib.closing(JsonlWriter(path)) as writer:
    ...     writer.write_scalars(10, {"inner_loss": 0.5, "outer_loss": float("nan")})
    >>> read_metrics(path)
    [{'step': 10, 'inner_loss': 0.5, 'outer_loss': 'NaN'}]
"""

from bilevel_flax.train.metrics.jsonl import JsonlWriter, read_metrics
from bilevel_flax.train.metrics.scalars import as_scalars
from bilevel_flax.train.metrics.writers import (
    MetricWriter,
    MultiWriter,
    TensorBoardWriter,
    open_writers,
)

__all__ = [
    "JsonlWriter",
    "MetricWriter",
    "MultiWriter",
    "TensorBoardWriter",
    "as_scalars",
    "open_writers",
    "read_metrics",
]
