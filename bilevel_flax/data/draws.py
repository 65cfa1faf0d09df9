"""Seeded draws that are the same on every platform and every version of NumPy.

`numpy.random.Generator` may change its streams between releases, and a resumed run must see the
same order as the run it continues; the raw words of a bit generator and `SeedSequence` may not
change, so everything random about the data is derived from those.
"""

import operator

import numpy as np


def check_seed(seed: int) -> int:
    """`seed` as a Python int, or an error that says what is wrong with it.

    Args:
        seed: a non-negative integer, NumPy integers included.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is negative.
    """
    try:
        value = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be a non-negative integer, got {seed!r:.40}") from None
    if value < 0:
        raise ValueError(f"seed must be a non-negative integer, got {value}")
    return value


def _words(n: int, key: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), np.uint64)


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of `range(n)`, a pure function of `key`.

    Args:
        n: how many.
        *key: non-negative integers: a seed first, then what tells the streams apart.

    Returns:
        int64 [n].

    Example:
        >>> sorted(permutation(4, 0, 7).tolist())
        [0, 1, 2, 3]
    """
    return np.argsort(_words(n, key), kind="stable")


def uniform(n: int, *key: int) -> np.ndarray:
    """Draws from [0, 1), a pure function of `key`.

    Args:
        n: how many.
        *key: non-negative integers: a seed first, then what tells the streams apart.

    Returns:
        float64 [n].
    """
    return (_words(n, key) >> np.uint64(11)) * 2.0**-53
