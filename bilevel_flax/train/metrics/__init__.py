"""Metric writers with the method names of clu's `MetricWriter`, without tensorflow.

`clu.metric_writers` imports tensorflow, so its interface class cannot be inherited from here. A
writer below can stand wherever a clu writer is asked for scalars, images, histograms, texts or
hyperparameters, and a clu writer (where tensorflow is installed) can stand in a `MultiWriter`.

Example:
    >>> import contextlib, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with contextlib.closing(JsonlWriter(path)) as writer:
    ...     writer.write_scalars(10, {"inner_loss": 0.5, "outer_loss": float("nan")})
    >>> read_metrics(path)
    [{'step': 10, 'inner_loss': 0.5, 'outer_loss': 'NaN'}]
"""

from bilevel_flax.train.metrics.many import MetricWriter, MultiWriter
from bilevel_flax.train.metrics.tensorboard import TensorBoardWriter
from bilevel_flax.train.metrics.writers import JsonlWriter, read_metrics

__all__ = ["JsonlWriter", "MetricWriter", "MultiWriter", "TensorBoardWriter", "read_metrics"]
