"""Losses that carry what is known about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class WrappedLoss:
    """A loss that carries what is known about it; called, it is the loss.

    Attributes:
        loss: the function.
    """

    loss: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """The loss."""
        return self.loss(*args)
