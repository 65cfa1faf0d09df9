"""How a run ends before its last step, and the words for it."""

from __future__ import annotations

import signal

from bilevel_flax.base import Info


class Diverged(FloatingPointError):
    """A direction was not finite; the message says which, at which step, and what to try."""


class Interrupted(RuntimeError):
    """SIGTERM or Ctrl-C; everything is saved.

    Attributes:
        signal: which one.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.signal = received


def raise_if_diverged(info: Info, step: int, kept: int | None) -> None:
    """Raises `Diverged` if the chunk's last step was not finite, with what to try.

    Args:
        info: of a chunk, leaves [steps].
        step: where it stopped.
        kept: the newest checkpoint's step, None: there is none.
    """
    finite = [bool(side[-1]) for side in info.finite]
    if all(finite):
        return
    sides = ("inner (D_z)", "adjoint (D_v)", "outer (D_x)")
    lost = [side for side, good in zip(sides, finite, strict=True) if not good]
    first = (
        "a lower inner step or gradient clipping, and check that the data hold no NaN and that "
        'batch["index"] lies within the per-sample parameters'
        if not finite[0]
        else "a lower adjoint step (below 2 over the inner loss's largest curvature) or clipping it"
        if not finite[1]
        else "a lower outer step, or clipping it"
    )
    where = (
        f"the checkpoint of step {kept} is kept" if kept is not None else "nothing was saved yet"
    )
    raise Diverged(
        f"step {step}: not finite: the direction of {', '.join(lost)} "
        f"(norms inner {info.norms.inner[-1]:.3g}, adjoint {info.norms.adjoint[-1]:.3g}, "
        f"outer {info.norms.outer[-1]:.3g}); {where}; try {first}"
    )
