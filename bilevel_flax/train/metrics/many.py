"""What a training loop asks of a writer, and several of them as one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import ArrayLike


class MetricWriter(Protocol):
    """What a training loop asks of a writer; the names and arguments are clu's."""

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""

    def write_images(self, step: int, images: Mapping[str, ArrayLike]) -> None:
        """Writes images, [h, w, c] or [n, h, w, c], uint8 or float in [0, 1]."""

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, ArrayLike],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes the distribution of each array's entries."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the run's hyperparameters, a flat mapping."""

    def flush(self) -> None:
        """Brings everything written so far to the disk."""

    def close(self) -> None:
        """Flushes and closes; nothing may be written afterwards."""


class MultiWriter:
    """Hands every call to each of several writers, ours or clu's.

    Args:
        writers: The writers, called in order.
    """

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, ArrayLike]) -> None:
        """Writes images, [h, w, c] or [n, h, w, c]."""
        for writer in self._writers:
            writer.write_images(step, images)

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, ArrayLike],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes the distribution of each array's entries."""
        for writer in self._writers:
            writer.write_histograms(step, arrays, num_buckets)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the run's hyperparameters."""
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        """Flushes each writer."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes each writer, also when one of them fails to."""
        errors: list[Exception] = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
