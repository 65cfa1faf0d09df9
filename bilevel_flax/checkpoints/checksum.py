"""The leaves of a state as a checkpoint sees them: names, and records with checksums.

A checkpoint stores one *record* (dtype, shape, checksum) for every leaf beside the values. Records
tell a damaged checkpoint (values and records disagree) from a foreign one (records and the model
disagree), and both are reported by the leaf's name.

The checksum of an array is linear in its bits, cut into words of at most 32 bits:

    sum_i weight_i word_i   mod 2^64,        weight_i odd, pseudo-random, i the position in C order

A change of any one word always shows (an odd number times less than 2^32 in size is no multiple of
2^64); a change of several goes unseen with a probability of about 2^-32. As a sum it does not care
in which pieces the array is visited, so that shards of one array, wherever they live, add up to the
checksum of the whole. It guards against accidents, not against forgery.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class Record(NamedTuple):
    """What a checkpoint knows of one leaf besides its values."""

    dtype: str  # NumPy's name; of the key data where the leaf is a typed PRNG key
    shape: tuple[int, ...]  # likewise
    impl: str = ""  # a typed PRNG key's implementation, empty for ordinary arrays
    checksum: str = ""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Record":
        """Reads what `Record._asdict` became in JSON."""
        record = cls(**fields)
        return record._replace(shape=tuple(record.shape))

    def __str__(self) -> str:
        kind = f"{self.impl} key, " if self.impl else ""
        return f"{kind}{self.dtype}[{', '.join(map(str, self.shape))}]"


def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by name, in the tree's order.

    A name is the key path joined by dots, `inner_params.Dense_0.kernel`. Percent, dot and slash
    inside one key are percent-encoded: Orbax writes `{"a.b": x}` and `{"a": {"b": x}}` to one
    place.

    Args:
        tree: any pytree.

    Returns:
        Leaf name -> leaf.

    Raises:
        ValueError: two leaves have one name (a custom node with repeated keys).
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = ".".join(_escape(jax.tree_util.keystr((key,), simple=True)) for key in path)
        if name in leaves:
            raise ValueError(f"state: two leaves are named {name!r}; give the node distinct keys.")
        leaves[name] = leaf
    return leaves


def _escape(key: str) -> str:
    return key.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")


def describe(name: str, leaf: Any) -> Record:
    """The record of a template's leaf, without checksum; reads no values.

    Args:
        name: the leaf's name, for the error.
        leaf: a jax or NumPy array, or a `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: the leaf is not an array of numbers, booleans or PRNG keys.
    """
    if not is_key(name, leaf):
        return Record(np.dtype(leaf.dtype).name, tuple(leaf.shape))
    impl = ""

    def key_data(key: jax.Array) -> jax.Array:
        nonlocal impl
        impl = str(jax.random.key_impl(key))
        return jax.random.key_data(key)

    data = jax.eval_shape(key_data, leaf)
    return Record(data.dtype.name, data.shape, impl)


def is_key(name: str, leaf: Any) -> bool:
    """Whether the leaf is a typed PRNG key; raises TypeError unless it is that or a plain array."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return True
        if jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_:
            return False
        found = f"dtype {leaf.dtype}"
    else:
        found = f"type {type(leaf).__name__}"
    value = " ".join(repr(leaf).split())
    raise TypeError(
        f"state: leaf {name!r} has {found} (value {value[:40]}); a checkpoint holds arrays of "
        "numbers only: make it jnp.asarray(...), or a static field (pytree_node=False)."
    )


def first_mismatch(saved: Mapping[str, Record], expected: Mapping[str, Record]) -> str | None:
    """The first leaf in which a checkpoint and a model differ, in words; None if they agree.

    Args:
        saved: the checkpoint's records.
        expected: the model's records (`describe`), in the model's order.
    """
    for name, record in expected.items():
        if name not in saved:
            return f"leaf {name!r}: the model expects {record}, the checkpoint has no such leaf"
        if saved[name]._replace(checksum="") != record:
            return f"leaf {name!r}: the model expects {record}, the checkpoint has {saved[name]}"
    for name, record in saved.items():
        if name not in expected:
            return f"leaf {name!r}: the checkpoint has {record}, the model has no such leaf"
    return None
