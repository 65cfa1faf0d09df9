"""The checksum of an array: linear in its bits, so that shards add up to it wherever they live.

The array is cut into words of at most 32 bits:

    sum_i weight_i word_i   mod 2^64,        weight_i odd, pseudo-random, i the position in C order

A change of any one word always shows (an odd number times less than 2^32 in size is no multiple of
2^64); a change of several goes unseen with a probability of about 2^-32. It guards against
accidents, not against forgery.
"""

import math

import numpy as np

_BLOCK = 1 << 14  # Words a pass: what a pass touches stays in the second-level cache.


def _odd_words(first: int, count: int) -> np.ndarray:
    """Pseudo-random odd 64-bit words `first ... first + count - 1`, by splitmix64.

    References:
        G. L. Steele, D. Lea, C. H. Flood. Fast Splittable Pseudorandom Number Generators. OOPSLA
        2014.
    """
    word = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))) | np.uint64(1)


_IN_BLOCK = _odd_words(0, _BLOCK)


def checksum(array: np.ndarray) -> str:
    """The position-dependent 64-bit sum of an array's bits; see the module's docstring.

    Args:
        array: numbers or booleans of any dtype and shape; the order in memory does not matter.

    Returns:
        Sixteen hexadecimal digits.

    Example:
        >>> checksum(np.array([1, 2], np.int32)) == checksum(np.array([2, 1], np.int32))
        False
    """
    return as_checksum(piece_sum(array, (0,) * array.ndim, array.shape))


def as_checksum(total: int) -> str:
    """A sum of `piece_sum`s as a checksum."""
    return f"{total % 2**64:016x}"


def piece_sum(piece: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """What a rectangular piece contributes to the checksum of the whole array.

    Args:
        piece: the piece's values.
        start: where in the whole it begins, an index for each axis.
        shape: of the whole.

    Returns:
        The sum over the piece; those of pieces that tile the whole add up to the whole's, mod 2^64.

    Example:
        >>> whole = np.arange(6.0).reshape(2, 3)
        >>> left, right = whole[:, :1], whole[:, 1:]
        >>> total = piece_sum(left, (0, 0), (2, 3)) + piece_sum(right, (0, 1), (2, 3))
        >>> as_checksum(total) == checksum(whole)
        True
    """
    if not piece.size:
        return 0
    flat = np.ascontiguousarray(piece).reshape(-1)
    words = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    width = words.size // flat.size
    # From this axis on, what is contiguous in the piece is contiguous in the whole.
    cut = max((i for i in range(piece.ndim) if piece.shape[i] != shape[i]), default=0)
    run = math.prod(piece.shape[cut:]) * width
    row = math.prod(shape[cut:]) * width
    first = start[cut] * math.prod(shape[cut + 1 :]) * width if piece.ndim else 0
    rows = np.zeros(1, np.int64)
    for axis in range(cut):
        rows = rows[:, None] * shape[axis] + start[axis] + np.arange(piece.shape[axis])
        rows = rows.reshape(-1)
    firsts = rows * row + first
    if run >= _BLOCK // 8:
        runs = words.reshape(-1, run)
        return sum(_run_sum(runs[i], int(at)) for i, at in enumerate(firsts))
    return _short_runs_sum(words.reshape(-1, run), firsts)


def _run_sum(words: np.ndarray, first: int) -> int:
    """The sum over words that are contiguous in the whole, from position `first` on."""
    # weight_i = (block's weight) x (weight within the block): one multiplication a word, no table
    # as long as the array.
    block, inside = divmod(first, _BLOCK)
    weights = _odd_words(_BLOCK + block, -(-(inside + words.size) // _BLOCK))
    buffer = np.empty(_BLOCK, np.uint64)
    total = done = 0
    for weight in weights:
        piece = words[done : done + _BLOCK - inside]
        within = _IN_BLOCK[inside : inside + piece.size]
        products = np.multiply(piece, within, out=buffer[: piece.size])
        total += int(weight) * int(products.sum())
        done, inside = done + piece.size, 0
    return total


def _short_runs_sum(words: np.ndarray, firsts: np.ndarray) -> int:
    """The sum over rows of words, row i contiguous in the whole from position firsts[i] on."""
    at_once = max(1, (1 << 18) // words.shape[1])
    total = 0
    for i in range(0, len(firsts), at_once):
        positions = firsts[i : i + at_once, None] + np.arange(words.shape[1])
        block, inside = np.divmod(positions, _BLOCK)
        lowest = int(block.min())
        weights = _odd_words(_BLOCK + lowest, int(block.max()) - lowest + 1)[block - lowest]
        weights *= _IN_BLOCK[inside]
        total += int((weights * words[i : i + at_once]).sum())
    return total
