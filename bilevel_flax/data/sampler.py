"""Which minibatch comes when: every id exactly once an epoch, a pure function of the position."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from bilevel_flax.data import draws

_STREAM = 2


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws the ids of minibatches; nothing to save but three numbers and the step.

    The ids form one endless stream: epoch e is the permutation of `range(num_batches)` drawn from
    (seed, e), and update t takes the stream's positions [t * per_step, (t + 1) * per_step). So any
    range of updates can be asked for at any time, and a resumed run sees what it would have seen.
    Two samplers that should be independent (inner, outer) need different seeds.

    Attributes:
        num_batches: minibatches in the finite sum.
        seed: non-negative.
        per_step: minibatches that one update takes.

    Raises:
        TypeError: `seed` is no integer.
        ValueError: `num_batches` or `per_step` is below 1, or `seed` is negative.

    Example:
        >>> sampler = Sampler(num_batches=3, seed=0)
        >>> sorted(sampler.ids(0, 3).tolist())
        [0, 1, 2]
        >>> Sampler(num_batches=3, seed=0, per_step=2).ids(0, 4).shape
        (4, 2)
    """

    num_batches: int
    seed: int
    per_step: int = 1

    def __post_init__(self):
        draws.check_seed(self.seed)
        for name in ("num_batches", "per_step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def ids(self, start: int, stop: int) -> np.ndarray:
        """The minibatches of updates `start` up to, not including, `stop`.

        Args:
            start: the first update, from 0.
            stop: one past the last, at least `start`.

        Returns:
            int32 [stop - start], or [stop - start, per_step] where per_step > 1.

        Raises:
            ValueError: not 0 <= start <= stop.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"ids needs 0 <= start <= stop, got start={start}, stop={stop}")
        first, last = start * self.per_step, stop * self.per_step
        stream = np.empty(last - first, np.int32)
        position = first
        while position < last:
            epoch, offset = divmod(position, self.num_batches)
            count = min(self.num_batches - offset, last - position)
            order = _epoch(int(self.seed), int(epoch), int(self.num_batches))
            stream[position - first :][:count] = order[offset : offset + count]
            position += count
        return stream if self.per_step == 1 else stream.reshape(-1, self.per_step)

    def epoch(self, step: int) -> float:
        """How many times the whole data has been seen after `step` updates."""
        return step * self.per_step / self.num_batches

    def state(self) -> dict[str, int]:
        """What a checkpoint stores beside the step; `check` compares it."""
        return {name: int(value) for name, value in dataclasses.asdict(self).items()}

    def check(self, state: Mapping[str, Any]) -> None:
        """Makes sure that a saved position belongs to this sampler.

        Args:
            state: what `state()` returned when the checkpoint was written.

        Raises:
            ValueError: a key is missing or differs; names it and both values.
        """
        for name, value in self.state().items():
            if name not in state:
                raise ValueError(f'the saved sampler state has no "{name}", only {sorted(state)}')
            if state[name] != value:
                raise ValueError(
                    f"the checkpoint was written with {name}={state[name]} and this run has "
                    f"{name}={value}: use {name}={state[name]}, or start in a new workdir"
                )


@functools.lru_cache(maxsize=16)
def _epoch(seed: int, epoch: int, num_batches: int) -> np.ndarray:
    order = draws.permutation(num_batches, seed, _STREAM, epoch).astype(np.int32)
    order.flags.writeable = False
    return order
