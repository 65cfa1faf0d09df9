"""The leaves of a state as a checkpoint sees them: names, host copies, records with checksums.

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
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    # weight_i = (block's weight) x (weight within the block): one multiplication a word, no table
    # as long as the array.
    blocks = _odd_words(_BLOCK, -(-words.size // _BLOCK))
    buffer = np.empty(_BLOCK, np.uint64)
    total = 0
    for block, start in enumerate(range(0, words.size, _BLOCK)):
        piece = words[start : start + _BLOCK]
        products = np.multiply(piece, _IN_BLOCK[: piece.size], out=buffer[: piece.size])
        total += int(blocks[block]) * int(products.sum())
    return f"{total % 2**64:016x}"


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
    if not _is_key(name, leaf):
        return Record(np.dtype(leaf.dtype).name, tuple(leaf.shape))
    impl = ""

    def key_data(key: jax.Array) -> jax.Array:
        nonlocal impl
        impl = str(jax.random.key_impl(key))
        return jax.random.key_data(key)

    data = jax.eval_shape(key_data, leaf)
    return Record(data.dtype.name, data.shape, impl)


def _is_key(name: str, leaf: Any) -> bool:
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


def host_copy(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, Record]]:
    """Copies every leaf into host memory of its own.

    The copies never share memory with a leaf: a NumPy view of a jax array on a CPU keeps the buffer
    referenced and so silently cancels its donation.

    Args:
        tree: any pytree of jax or NumPy arrays, typed PRNG keys included.

    Returns:
        Leaf name -> array (key data for a typed PRNG key); leaf name -> record without checksum.

    Raises:
        TypeError: a leaf is not an array (Python scalars and strings included).
        ValueError: a leaf has been donated, or has shards in other processes.
    """
    leaves, impls = named_leaves(tree), {}
    for name, leaf in leaves.items():
        is_key = _is_key(name, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"state: leaf {name!r} is a jax.ShapeDtypeStruct; save arrays.")
        if not isinstance(leaf, jax.Array):
            continue
        if leaf.is_deleted():
            raise ValueError(
                f"state: leaf {name!r} has been donated or deleted; save the state that the step "
                "returned."
            )
        if not leaf.is_fully_addressable:
            raise ValueError(
                f"state: leaf {name!r} has shards in other processes; gather it first "
                "(jax.experimental.multihost_utils.process_allgather)."
            )
        if is_key:
            impls[name] = str(jax.random.key_impl(leaf))
            leaf = leaves[name] = jax.random.key_data(leaf)
        if next(iter(leaf.devices())).platform != "cpu":
            leaf.copy_to_host_async()  # All transfers run at once; _own_copy collects them.
    arrays = {name: _own_copy(leaf) for name, leaf in leaves.items()}
    records = {n: Record(a.dtype.name, a.shape, impls.get(n, "")) for n, a in arrays.items()}
    return arrays, records


def _own_copy(leaf: Any) -> np.ndarray:
    array = np.array(leaf, copy=True, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def with_checksums(
    records: Mapping[str, Record], arrays: Mapping[str, np.ndarray]
) -> dict[str, Record]:
    """Fills in the checksums of the arrays."""
    return {
        name: record._replace(checksum=checksum(arrays[name])) for name, record in records.items()
    }


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


def first_damage(arrays: Mapping[str, np.ndarray], saved: Mapping[str, Record]) -> str | None:
    """The first array that does not match its record, in words; None if all do."""
    for name, record in saved.items():
        array = arrays[name]
        if (array.dtype.name, array.shape) != (record.dtype, record.shape):
            found = Record(array.dtype.name, array.shape, record.impl)
            return f"leaf {name!r} was saved as {record} and reads as {found}"
        if checksum(array) != record.checksum:
            return f"leaf {name!r} has changed on disk (its checksum differs)"
    return None


def rebuild(leaf: Any, array: np.ndarray, impl: str) -> Any:
    """A leaf like the template's, with the stored values.

    Args:
        leaf: the template's leaf; its kind (jax or NumPy) and sharding are taken over. The result
            is committed to devices only if that leaf is: a jitted function retraces otherwise.
        array: the stored values, in host memory.
        impl: the implementation, where the leaf is a typed PRNG key; else empty.

    Returns:
        A jax array without weak type and with memory of its own (safe to donate), or a NumPy array
        where the template has one.
    """
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    # copy=True: on a CPU jax may otherwise adopt NumPy's buffer, which it can never donate.
    value = jnp.array(array, copy=True)
    if value.dtype != array.dtype:
        raise ValueError(
            f"template: {array.dtype} became {value.dtype}; set jax_enable_x64 as at the save."
        )
    if impl:
        value = jax.random.wrap_key_data(value, impl=impl)
    if getattr(leaf, "committed", True) and leaf.sharding is not None:
        value = jax.device_put(value, leaf.sharding)
    return value
