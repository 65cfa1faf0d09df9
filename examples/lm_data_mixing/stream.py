"""Text -> windows -> candidates, read through Grain when they are needed.

The target's text is cut into blocks that are dealt out at random: a small part is what F sees,
two are held out, and the rest is training text like any other, or left out altogether.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from bilevel_flax import data
from bilevel_flax.data import draws
from bilevel_flax.train.config import ConfigError

_BLOCK = 16  # windows that stay together, so that held-out text is not a neighbour of F's
_STREAM = 11  # keeps the deal apart from a run's other draws


class Windows:
    """Windows of one text, side by side: a Grain source.

    Args:
        tokens: integers [n]; may be mapped from a file.
        starts: int [windows], where each begins.
        length: tokens that are predicted in each; it holds one more.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, length: int):
        self._tokens, self._starts, self._length = tokens, starts, length

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> np.ndarray:
        """[length + 1]."""
        start = self._starts[index]
        return np.asarray(self._tokens[start : start + self._length + 1])

    def all(self) -> np.ndarray:
        """[windows, length + 1]."""
        return np.asarray(self._tokens)[self._starts[:, None] + np.arange(self._length + 1)]

    def part(self, chosen: np.ndarray) -> Windows:
        """Those at the positions `chosen`."""
        return Windows(self._tokens, self._starts[chosen], self._length)


def windows(tokens: np.ndarray, length: int, key: str) -> Windows:
    """All windows of a text.

    Raises:
        ConfigError: it is too short for one.
    """
    if len(tokens) <= length:
        raise ConfigError(
            f"{key}: {len(tokens)} bytes are too few for one window of --config.length={length} "
            "and one more: give more text, or leave the domain out with none in place of the path"
        )
    return Windows(tokens, np.arange(0, len(tokens) - length, length), length)


class Target(NamedTuple):
    """The target's text, in four parts that share nothing."""

    outer: Windows  # F
    validation: Windows
    test: Windows
    rest: Windows


def split(
    whole: Windows, shares: Mapping[str, float], batch_size: int, seed: int, key: str
) -> Target:
    """Deals blocks of the target's text out.

    Args:
        whole: the target's windows.
        shares: of `outer`, `validation` and `test`, positive, at most 1 together.
        batch_size: windows of F in a minibatch.
        seed: of the deal.
        key: of the config, for errors.

    Raises:
        ConfigError: shares out of range, or too little text for them.
    """
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ConfigError(f"--config.data.{name}_share={share}: must lie in (0, 1)")
    if sum(shares.values()) > 1:
        raise ConfigError(
            f"--config.data.*_share: {', '.join(f'{k} {v}' for k, v in shares.items())} are more "
            "than all of the target's text"
        )
    # In a short text blocks are smaller, so that every part gets some.
    block = max(1, min(_BLOCK, int(len(whole) * min(shares.values())) // 4))
    order = draws.permutation(-(-len(whole) // block), seed, _STREAM)
    order = (order[:, None] * block + np.arange(block)).reshape(-1)
    order = order[order < len(whole)]
    cuts = np.cumsum([round(share * len(whole)) for share in shares.values()])
    parts = [whole.part(np.sort(part)) for part in np.split(order, cuts)]
    needed = {"outer": batch_size, "validation": 1, "test": 1}
    for (name, least), part in zip(needed.items(), parts, strict=False):
        if len(part) < least:
            raise ConfigError(
                f"{key}: {len(whole)} windows of text, of which --config.data.{name}_share="
                f"{shares[name]} gives {len(part)} for {name}, fewer than one batch of {least}: "
                "give more text, or a larger share"
            )
    return Target(*parts)


def candidates(
    domains: Mapping[str, Windows],
    count: int,
    seed: int,
    most: int | None = None,
    numbers: Sequence[int] | None = None,
) -> data.FiniteSum:
    """Minibatches of candidates, the domains in turn, each shuffled and repeated on its own.

    Args:
        domains: their windows.
        count: candidates in a minibatch.
        seed: of the orders.
        most: minibatches; None: as many as show every window of the largest domain once.
        numbers: of the domains; parts of one domain have one number. None: 0, 1, ...

    Returns:
        `tokens` [num_batches, count, length + 1], `domain` int32 [num_batches, count] and `part`
        int32 [num_batches, count], which of the parts with its number; read on demand.
    """
    numbers = list(range(len(domains)) if numbers is None else numbers)
    parts = [numbers[:place].count(number) for place, number in enumerate(numbers)]
    sources = [
        grain.MapDataset.source(source)
        .seed(seed + place)
        .shuffle()
        .repeat()
        .map(
            lambda tokens, number=number, part=part: {
                "tokens": tokens,
                "domain": np.int32(number),
                "part": np.int32(part),
            }
        )
        for place, (source, number, part) in enumerate(
            zip(domains.values(), numbers, parts, strict=True)
        )
    ]
    mixed = grain.MapDataset.mix(sources).batch(count)
    largest = max(len(source) for source in domains.values())
    length = -(-len(sources) * largest // count)
    return data.streamed(mixed, length if most is None else min(most, length))
