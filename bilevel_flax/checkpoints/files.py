"""The files of a checkpoint: their sizes, and checksums of the small ones, before Orbax reads them.

At the first failure among its concurrent reads Orbax closes their event loop, and Python prints an
exception that nobody can catch for each of the others. A file that is gone, truncated or altered is
therefore found here. Large files hold values, which have checksums of their own (`checksum`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils import epath

_SMALL = 2**20  # bytes


def describe_files(path: epath.Path, items: Iterable[str]) -> dict[str, list[int]]:
    """Size, and CRC-32 where the file is small, of all files of the items, by relative path."""
    files, folders = [], [path / item for item in items]
    while folders:
        for child in folders.pop().iterdir():
            (folders if child.is_dir() else files).append(child)
    return {file.relative_to(path).as_posix(): _describe(file) for file in files}


def _describe(file: epath.Path) -> list[int]:
    size = file.stat().length
    return [size, zlib.crc32(file.read_bytes())] if size <= _SMALL else [size]


def first_damaged_file(path: epath.Path, files: Mapping[str, list[int]]) -> str | None:
    """The first file that is not as it was, in words; None if all are."""
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            return f"the file {name} is missing"
        size = file.stat().length
        if size != expected[0]:
            return f"the file {name} has {size} bytes instead of {expected[0]}"
        if _describe(file) != expected:
            return f"the file {name} has changed on disk"
    return None
