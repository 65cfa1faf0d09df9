"""The decoded arrays of a prepared set, kept beside it: decoding MNIST anew takes seconds a run."""

import contextlib
import os
import pathlib
import zipfile

import numpy as np

_FILE = "bilevel_flax_decoded.npz"
_LARGEST = 2**30  # bytes; above that a second copy on disk costs more than it saves


def load(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    """What `save` kept, or None where there is nothing, or nothing that can be trusted.

    Args:
        folder: of the prepared set.
    """
    try:
        # The zip format keeps a CRC of every array, and numpy checks it.
        with np.load(folder / _FILE, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if arrays.pop("records", np.array("")) == _records(folder) else None


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Keeps arrays beside a prepared set; does nothing where that cannot be written.

    Args:
        folder: of the prepared set.
        arrays: what to keep, under names other than "records".
    """
    if sum(array.nbytes for array in arrays.values()) > _LARGEST:
        return
    temporary = folder / f"{_FILE}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            np.savez(file, records=_records(folder), **arrays)  # pyright: ignore
        temporary.replace(folder / _FILE)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _records(folder: pathlib.Path) -> np.ndarray:
    # Ties the arrays to the records that they came from: names and sizes.
    files = sorted(folder.glob("*.array_record*"))
    return np.array(" ".join(f"{path.name}:{path.stat().st_size}" for path in files))
