"""Checkpoints of a TrainState from any loop, on Orbax, which is imported when it is used."""

from bilevel_flax.checkpoints.best import BestCheckpoint
from bilevel_flax.checkpoints.checkpointer import Checkpointer, Restored
from bilevel_flax.checkpoints.errors import CheckpointError, CheckpointMismatch
from bilevel_flax.checkpoints.own_loop import (
    latest_step,
    restore,
    restore_inner,
    restore_parts,
    save,
    warm_start,
)
from bilevel_flax.checkpoints.processes import Processes

__all__ = [
    "BestCheckpoint",
    "CheckpointError",
    "CheckpointMismatch",
    "Checkpointer",
    "Processes",
    "Restored",
    "latest_step",
    "restore",
    "restore_inner",
    "restore_parts",
    "save",
    "warm_start",
]
