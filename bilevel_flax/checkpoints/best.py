"""The network from when a validation metric was lowest: early stopping that survives a kill."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.checkpoints import arrays_file
from bilevel_flax.checkpoints.errors import Damaged, reason
from bilevel_flax.checkpoints.template import Template

_logger = logging.getLogger("bilevel_flax")


class BestCheckpoint:
    """Keeps the best of the trees that it is handed in a file.

    A resumed run hands over again what the interrupted one had, so a file that is ahead of the
    checkpoint ends up the same; nothing of it belongs into a checkpoint.

    Args:
        path: an `.npz` file; need not exist. A damaged one is moved aside, and the best is then
            that of what comes.
        on_event: called with one line of text about a damaged file. Default: a warning of the
            logger `bilevel_flax`.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> best = BestCheckpoint(Path(tempfile.mkdtemp()) / "best.npz")
        >>> for step, loss in enumerate([0.5, 0.2, 0.3]):
        ...     best.maybe_save(step, loss, {"w": jnp.full(2, loss)})
        >>> step, tree = best.restore({"w": jnp.zeros(2)})
        >>> step, tree["w"].tolist()
        (1, [0.20000000298023224, 0.20000000298023224])
    """

    def __init__(self, path: Path, on_event: Callable[[str], Any] | None = None):
        self._path = path
        self._value = np.inf
        if not path.exists():
            return
        try:
            old = _old(path)
            self._value = float((old[1] if old else arrays_file.read(path)[2])["value"])
        except Damaged as error:
            aside = path.with_suffix(".damaged.npz")
            os.replace(path, aside)
            (on_event or _logger.warning)(
                f"The best network so far is lost: {error}. It was moved to {str(aside)!r}; the "
                "best is now that of the evaluations to come."
            )

    def maybe_save(self, step: int, value: float, tree: Any) -> None:
        """Saves `tree` if `value` is lower than all before (the first of equals stays)."""
        if value < self._value:
            self._value = value
            arrays_file.write(self._path, tree, {"step": step, "value": value})

    def restore(self, template: Any) -> tuple[int, Any]:
        """(step, tree) of the lowest value; (0, template) if there was none.

        Raises:
            CheckpointMismatch: the file holds another model.
            Damaged: it has been damaged since this object was made.
        """
        if not self._path.exists():
            return 0, template
        old = _old(self._path)
        if old is None:
            tree, meta = arrays_file.restore(self._path, Template(template))
            return int(meta["step"]), tree
        leaves, structure = jax.tree.flatten(template)
        arrays = [a.view(leaf.dtype) for a, leaf in zip(old[0], leaves, strict=True)]
        return old[1]["step"], jax.tree.unflatten(structure, map(jnp.asarray, arrays))


def _old(path: Path) -> tuple[list[np.ndarray], dict[str, Any]] | None:
    """Leaves and metadata of a file of before 0.2, which numbers the leaves; None of another."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "leaf0" not in file.files:
                return None
            arrays = [file[f"leaf{i}"] for i in range(len(file.files) - len(("value", "step")))]
            return arrays, {"step": int(file["step"]), "value": float(file["value"])}
    except Exception as error:  # zipfile, zlib and NumPy have kinds of their own
        raise Damaged(f"{str(path)!r} cannot be read ({reason(error)})") from error
