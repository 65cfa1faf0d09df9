"""A tree of arrays in one `.npz` file that is there whole, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel_flax.checkpoints.errors import Damaged, reason
from bilevel_flax.checkpoints.records import Record
from bilevel_flax.checkpoints.shards import host_copy, rebuild
from bilevel_flax.checkpoints.template import Template

_ABOUT = "about"  # the entry that is JSON: {"meta", "leaves"}


def write(path: Path, tree: Any, meta: dict[str, Any]) -> None:
    """Writes a tree, one entry of the file a leaf.

    Args:
        path: of the file. What there was is replaced when the new one is on the disk.
        tree: any pytree of arrays.
        meta: anything that JSON holds.
    """
    arrays, records = host_copy(tree)
    about = {"meta": meta, "leaves": {name: record._asdict() for name, record in records.items()}}
    entries: dict[str, Any] = {f"leaf.{n}": _as_numpy_knows(a) for n, a in arrays.items()}
    partial = path.with_suffix(".partial.npz")
    with partial.open("wb") as file:
        np.savez(file, **{_ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8), **entries})
        file.flush()
        os.fsync(file.fileno())  # else a power failure leaves the new name without contents
    os.replace(partial, path)


def _as_numpy_knows(array: Any) -> np.ndarray:
    """Bits of bfloat16 and the like as whole numbers: savez forgets dtypes not NumPy's."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Record], dict[str, Any]]:
    """Values and records by leaf name, and the metadata; the file's own checksums are verified.

    Raises:
        Damaged: the file is not what was written.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file[_ABOUT].tobytes())
            records = {name: Record.from_json(r) for name, r in about["leaves"].items()}
            arrays = {n: file[f"leaf.{n}"].view(jnp.dtype(r.dtype)) for n, r in records.items()}
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib, json and NumPy have kinds of their own
        raise Damaged(f"{str(path)!r} cannot be read ({reason(error)})") from error
    return arrays, records, about["meta"]


def restore(path: Path, template: Template) -> tuple[Any, dict[str, Any]]:
    """The template's tree with the values read, and the metadata.

    Raises:
        Damaged: the file is not what was written.
        CheckpointMismatch: it is another model's; the first differing leaf is named.
    """
    arrays, records, meta = read(path)
    leaves = template.match(records, str(path))
    values = {
        name: rebuild(leaf, arrays[name], records[name].impl) for name, leaf in leaves.items()
    }
    return template.fill(values), meta
