"""Two streams of minibatches as one: what a trainer that knows a single stream is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def pairs(
    inner: Iterable[Any], outer: Callable[[], Iterable[Any]] | Iterable[Any]
) -> Iterator[dict[str, Any]]:
    """`{"inner": minibatch, "outer": minibatch}` as long as the inner stream goes on.

    Args:
        inner: training minibatches (a Hugging Face `IterableDataset.batch(...)`, a Grain pipeline).
        outer: validation minibatches without an end; or a function that starts them anew, for ones
            that end.

    Raises:
        ValueError: from the iterator, an outer stream without any minibatch, or one that ended and
            cannot be started anew.

    Example:
        >>> [pair["outer"] for pair in pairs(range(3), lambda: "ab")]
        ['a', 'b', 'a']
    """
    again = outer if callable(outer) else None
    stream = iter(outer() if again else outer)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for minibatch in inner:
        try:
            other = next(stream)
        except StopIteration:
            stream = iter(again()) if again else iter(())
            other = next(stream, None)
            if other is None:
                raise ValueError(
                    "the outer stream ended before the inner one: hand over a function that starts "
                    "it anew, outer=lambda: ..."
                ) from None
        yield {"inner": minibatch, "outer": other}
