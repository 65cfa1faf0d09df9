"""Stratified splits: every part has the classes in the proportions of the whole."""

from collections.abc import Mapping

import numpy as np

from bilevel_flax.data import draws

_STREAM = 4


def stratified(labels: np.ndarray, sizes: Mapping[str, int], *, seed: int) -> dict[str, np.ndarray]:
    """Draws disjoint parts of given sizes, each with the class proportions of the whole.

    A class's share of a part is proportional up to rounding (exact for a balanced set and round
    sizes); what the sizes leave over belongs to no part.

    Args:
        labels: integers [n].
        sizes: the parts' names and numbers of examples, 0 allowed.
        seed: non-negative; the split is a pure function of labels, sizes and seed.

    Returns:
        Positions int32 [size] for each part, shuffled.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is negative, or together they exceed n.

    Example:
        >>> import numpy as np
        >>> parts = stratified(np.repeat([0, 1], 50), {"train": 60, "test": 40}, seed=0)
        >>> np.repeat([0, 1], 50)[parts["train"]].sum()
        np.int64(30)
    """
    labels = np.asarray(labels)
    check_sizes(sizes, len(labels))
    seed = draws.check_seed(seed)
    shuffled = draws.permutation(len(labels), seed, _STREAM, 0)

    # An example's key is its rank within its class as a fraction of the class: sorted by it, the
    # classes interleave evenly, so that every contiguous run is stratified.
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        key[members] = (np.arange(len(members)) + 0.5) / len(members)
    interleaved = shuffled[np.argsort(key[shuffled], kind="stable")]

    parts, start = {}, 0
    for part, (name, size) in enumerate(sizes.items(), 1):
        run = interleaved[start : start + size]
        parts[name] = run[draws.permutation(size, seed, _STREAM, part)].astype(np.int32)
        start += size
    return parts


def check_sizes(sizes: Mapping[str, int], available: int, source: str = "the data") -> None:
    """Makes sure that parts of these sizes can be drawn.

    Args:
        sizes: the parts' names and numbers of examples.
        available: how many examples there are.
        source: what the error calls them.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is negative, or together they exceed `available`.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"the size of the {name} split must be an integer, got {size!r}")
        if size < 0:
            raise ValueError(f"the size of the {name} split must be at least 0, got {size}")
    total = sum(sizes.values())
    if total > available:
        listed = " + ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"the splits ask for {listed} = {total} examples and {source} has {available}: "
            f"take {total - available} fewer"
        )
