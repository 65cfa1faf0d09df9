"""The network from when a validation metric was lowest: early stopping that survives a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class BestCheckpoint:
    """Keeps the best of the trees that it is offered in a file.

    A resumed run offers again what the interrupted one had offered, so a file that is ahead of the
    checkpoint ends up the same; nothing of it belongs into a checkpoint.

    Args:
        path: an `.npz` file; need not exist.
    """

    def __init__(self, path: Path):
        self._path = path
        self._value = np.inf
        if path.exists():
            with np.load(path, allow_pickle=False) as saved:
                self._value = float(saved["value"])

    def maybe_save(self, step: int, value: float, tree: Any) -> None:
        """Keeps `tree` if `value` is lower than all before (the first of equals stays)."""
        if not value < self._value:
            return
        self._value = value
        leaves: dict[str, Any] = {
            f"leaf{i}": np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))
        }
        partial = self._path.with_suffix(".partial.npz")
        np.savez(partial, value=value, step=step, **leaves)
        os.replace(partial, self._path)

    def restore(self, template: Any) -> tuple[int, Any]:
        """(step, tree) of the best offer; (0, template) if nothing finite was offered."""
        if not self._path.exists():
            return 0, template
        with np.load(self._path, allow_pickle=False) as saved:
            leaves, structure = jax.tree.flatten(template)
            found = [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(leaves))]
            return int(saved["step"]), jax.tree.unflatten(structure, found)
