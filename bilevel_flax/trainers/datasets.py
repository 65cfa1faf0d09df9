"""Hugging Face `datasets` as a source: minibatches with the rows' positions, domains with numbers.

Needs `pip install datasets`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets


def minibatches(
    dataset: Any, batch_size: int, *, seed: int = 0, epochs: int | None = None
) -> Iterator[dict[str, Any]]:
    """NumPy minibatches of a data set, shuffled anew in every epoch; a short last one is left out.

    Args:
        dataset: a `Dataset`, or an `IterableDataset` (which shuffles within a buffer).
        batch_size: examples in a minibatch.
        seed: of the shuffles.
        epochs: how often the data are read; None: without an end.

    Yields:
        The columns, [batch, ...], and `index` [batch], each example's position in `dataset`: its
        row of per-sample weights. A column of that name stays as it is.

    Raises:
        ValueError: a data set with fewer examples than a minibatch.
    """
    streamed = isinstance(dataset, datasets.IterableDataset)
    columns = dataset.column_names
    if columns is None or "index" not in columns:
        dataset = dataset.map(lambda row, i: {"index": i}, with_indices=True)
    dataset = dataset.with_format("numpy")
    for epoch in itertools.count() if epochs is None else range(epochs):
        empty = True
        for minibatch in dataset.shuffle(seed=seed + epoch).iter(batch_size, drop_last_batch=True):
            empty = False
            yield dict(minibatch)
        if empty:
            size = "" if streamed else f" ({len(dataset)})"
            raise ValueError(
                f"batch_size={batch_size}: the data set has fewer examples{size}: take less"
            )


def interleaved(
    domains: Mapping[str, Any], probabilities: Sequence[float] | None = None, *, seed: int = 0
) -> Any:
    """One data set of several domains, with a column `domain` for `bf.outer.domain_weights`.

    Args:
        domains: name -> data set; `domain` counts them in this order.
        probabilities: of each in the stream, the mixture's `proposal`; None: in turn.
        seed: of the draw.

    Returns:
        What `datasets.interleave_datasets` makes of them, until all were read once.

    Raises:
        ValueError: a probability is not positive, so that its domain would never be read.
    """
    for name, share in zip(domains, [] if probabilities is None else probabilities, strict=False):
        if not share > 0:
            raise ValueError(
                f"probabilities: {name!r} has {share!r}, and reading would never end: give it a "
                "positive one, or leave the domain out"
            )
    numbered = [
        part.map(lambda row, number=number: {"domain": number})
        for number, part in enumerate(domains.values())
    ]
    chosen = None if probabilities is None else list(probabilities)
    return datasets.interleave_datasets(
        numbered, probabilities=chosen, seed=seed, stopping_strategy="all_exhausted"
    )
