"""TensorBoard's event files, through tensorboardX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboardX import SummaryWriter

from bilevel_flax.train.metrics.writers import number


class TensorBoardWriter:
    """Writes TensorBoard event files through tensorboardX.

    Args:
        directory: The folder of the event files; it is made.
        purge_step: On resuming, the first step that will be written again: TensorBoard then
            hides what the interrupted run had written from there on.
    """

    def __init__(self, directory: str | Path, *, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write_scalars(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Writes one number per name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, number(name, value), step)

    def write_images(self, step: int, images: Mapping[str, ArrayLike]) -> None:
        """Writes [h, w, c] or [n, h, w, c] images, uint8 or float in [0, 1]; n make one grid."""
        for name, value in images.items():
            image = np.asarray(value)
            if image.ndim not in (3, 4) or image.shape[-1] not in (1, 3, 4):
                raise ValueError(
                    f"image {name!r}: expected [h, w, c] or [n, h, w, c] with 1, 3 or 4 "
                    f"channels, got shape {image.shape}"
                )
            if image.ndim == 3:
                self._writer.add_image(name, image, step, dataformats="HWC")
            else:
                self._writer.add_images(name, image, step, dataformats="NHWC")

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, ArrayLike],
        num_buckets: Mapping[str, int] | None = None,
    ) -> None:
        """Writes the distribution of each array's finite entries (30 buckets unless told)."""
        for name, value in arrays.items():
            entries = np.asarray(value, dtype=np.float64).ravel()
            entries = entries[np.isfinite(entries)]
            if entries.size:
                counts, edges = np.histogram(entries, (num_buckets or {}).get(name, 30))
                self._writer.add_histogram_raw(
                    name,
                    min=entries.min(),
                    max=entries.max(),
                    num=entries.size,
                    sum=entries.sum(),
                    sum_squares=np.square(entries).sum(),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=step,
                )

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text (markdown) per name."""
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters as a table under the name `hparams`."""
        rows = "".join(f"| {name} | `{value}` |\n" for name, value in sorted(hparams.items()))
        self._writer.add_text("hparams", "| name | value |\n|---|---|\n" + rows, 0)

    def flush(self) -> None:
        """Brings the events written so far to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()
