"""How a run ends before its last step, and the words for it."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import Info, TrainState
from bilevel_flax.checks import UserError
from bilevel_flax.tree import is_inexact

_SIDES = ("inner (D_z)", "adjoint (D_v)", "outer (D_x)")
# Parts of the state that are finite in a sound run; estimators may mark absent rows with NaN.
_FINITE_PARTS = (
    "inner_params",
    "adjoint",
    "outer_params",
    "model_state",
    "inner_opt_state",
    "adjoint_opt_state",
    "outer_opt_state",
)


class ConfigError(UserError):
    """A mistake in a config or an override; the message is one line that says how to mend it."""


class Diverged(FloatingPointError):
    """Something in the state was not finite; the message says what, when, and what to try."""


class Interrupted(RuntimeError):
    """SIGTERM or Ctrl-C; everything is saved.

    Attributes:
        signal: which one.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.signal = received


def nearest(name: str, known: Sequence[str]) -> str:
    """' (did you mean "x"?)', or '' when nothing is near.

    Example:
        >>> nearest("solver.inner.lr", ["solver.call", "solver.inner.learning_rate"])
        ' (did you mean "solver.inner.learning_rate"?)'
    """
    parent, _, last = name.rpartition(".")
    beside = [key for key in known if key.rpartition(".")[0] == parent]
    # A mistyped last part is the usual case: what the names have in front of it must not count.
    for candidates in (beside, known):
        tails = [key.rpartition(".")[2] for key in candidates]
        close = difflib.get_close_matches(last, tails, n=1, cutoff=0.6)
        close = close or [tail for tail in tails if _abbreviates(last, tail)]
        if close:
            same = [key for key in candidates if key.rpartition(".")[2] == close[0]]
            return f' (did you mean "{max(same, key=lambda key: _similarity(name, key))}"?)'
    return ""


def _similarity(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def check_choice(given: str, value: Any, known: Iterable[str]) -> None:
    """Raises unless `value` is among `known`.

    Args:
        given: the argument and its value, as the user wrote them: `--config.model=cnnn`.
        value: its value.
        known: what there is.

    Raises:
        ConfigError: names all of them, and the nearest.
    """
    known = list(known)
    if value not in known:
        raise ConfigError(f"{given}: choose one of {', '.join(known)}{nearest(str(value), known)}")


def _abbreviates(short: str, name: str) -> bool:
    """Whether it is a beginning of the name, or the initials of its words: `lr`."""
    initials = "".join(part[:1] for part in name.split("_"))
    return (len(short) > 2 and name.startswith(short)) or (len(short) > 1 and short == initials)


class FiniteCheck:
    """Finds what is not finite in a state: an optimiser can make a NaN of a finite direction.

    Args:
        initial: the state at the start. What is infinite there (a best value so far, say) may stay.
    """

    def __init__(self, initial: TrainState):
        self._compiled = jax.jit(_all_finite)
        self._sound = self._finite(initial)

    def first_lost(self, state: TrainState) -> str | None:
        """The name of the first leaf that has lost its finite values, and who may have done it."""
        lost = np.flatnonzero(self._sound & ~self._finite(state))
        if not lost.size:
            return None
        return list(_leaves(state))[lost[0]]

    def _finite(self, state: TrainState) -> np.ndarray:
        return np.asarray(self._compiled(list(_leaves(state).values())))


def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _leaves(state: TrainState) -> dict[str, Any]:
    return {
        f"{part}{jax.tree_util.keystr(path)}": leaf
        for part in _FINITE_PARTS
        for path, leaf in jax.tree.leaves_with_path(getattr(state, part))
        if is_inexact(leaf)
    }


def raise_if_lost(lost: str | None, step: int, saved: int | None) -> None:
    """Raises `Diverged` if a leaf of the state is not finite although every direction was.

    Args:
        lost: its name, from `FiniteCheck`.
        step: the state's.
        saved: the newest checkpoint's step, None: there is none.
    """
    if lost is None:
        return
    side = lost.partition("_")[0].partition("[")[0]
    variable = {"inner": "z", "adjoint": "v", "outer": "x"}.get(side)
    maker = (
        f"the optimiser of {variable} made it (a root of a negative number, a division by 0, a "
        "learning rate that is not finite)"
        if variable
        else "inner_loss returned it as its model state"
    )
    raise Diverged(
        f"step {step}: not finite: {lost}, though every direction was finite: {maker}; "
        f"{_what_is_saved(saved)}"
    )


def raise_if_diverged(info: Info, step: int, saved: int | None) -> None:
    """Raises `Diverged` if the chunk's last step was not `info.ok`, with what to try.

    Args:
        info: of a chunk, leaves [steps].
        step: where it stopped.
        saved: the newest checkpoint's step, None: there is none.
    """
    finite = [bool(side[-1]) for side in info.finite]
    if all(finite):
        losses = {"inner (G)": info.inner_loss, "outer (F)": info.outer_loss}
        for side, loss in losses.items():
            if loss is not None and not np.isfinite(loss[-1]):
                raise Diverged(
                    f"step {step}: the {side} loss is {float(loss[-1])}, although the directions "
                    f"are finite; {_what_is_saved(saved)}; try `bf.check_finite` on the first "
                    "minibatch, and check labels, masks and logarithms in the loss"
                )
        return
    lost = [side for side, good in zip(_SIDES, finite, strict=True) if not good]
    remedy = (
        "a lower inner step or gradient clipping, and check that the data hold no NaN and that "
        'batch["index"] lies within the per-sample parameters'
        if not finite[0]
        else "a lower adjoint step (below 2 over the inner loss's largest curvature) or clipping it"
        if not finite[1]
        else "a lower outer step, or clipping it"
    )
    raise Diverged(
        f"step {step}: not finite: the direction of {', '.join(lost)} "
        f"(norms inner {info.norms.inner[-1]:.3g}, adjoint {info.norms.adjoint[-1]:.3g}, "
        f"outer {info.norms.outer[-1]:.3g}); {_what_is_saved(saved)}; try {remedy}"
    )


def _what_is_saved(step: int | None) -> str:
    return f"the checkpoint of step {step} is kept" if step is not None else "nothing was saved yet"
