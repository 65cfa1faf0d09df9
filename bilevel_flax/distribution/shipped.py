"""Where configs, examples and the bench's tasks lie: in the checkout, or inside the wheel."""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path

_INSTALLED = ("site-packages", "dist-packages")


def root() -> Path:
    """The folder that holds `configs`, `examples` and `benchmarks`."""
    package = Path(str(importlib.resources.files("bilevel_flax")))
    inside = package / "_shipped"
    return inside if inside.is_dir() else package.parent


def make_importable() -> None:
    """Lets `examples...` and `benchmarks...` be imported.

    The user's own folders stay in front, so that an edited copy of an example is taken before the
    one that came with the package; installed packages come after, for some bring a stray `examples`
    of their own.
    """
    folder = str(root())
    if folder not in sys.path:
        installed = [i for i, place in enumerate(sys.path) if Path(place).name in _INSTALLED]
        sys.path.insert(installed[0] if installed else len(sys.path), folder)
