"""The leaves of a state as a checkpoint sees them: names, host copies, records with checksums.

A checkpoint stores one *record* (dtype, shape, checksum) for every leaf beside the values. Records
tell a damaged checkpoint (values and records disagree) from a foreign one (records and the model
disagree), and both are reported by the leaf's name.

The checksum of an array is a sum over its elements,

    sum_i mix(bits_i + (i + 1) * GOLDEN)   mod 2^64,        mix: a bijection of 64-bit words

with i the position in C order. `mix` being a bijection, a change of any one element always shows; a
change of several goes unseen with probability 2^-64. As a sum it does not care in which pieces the
array is visited, so that shards of one array, wherever they live, add up to the checksum of the whole.
It guards against accidents, not against forgery.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# splitmix64's constants (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_BLOCK = 1 << 14  # Words a pass: two buffers of it stay in the second-level cache.


def checksum(array: np.ndarray) -> str:
    """The position-dependent 64-bit sum of an array's bits; see the module's docstring.

    Args:
        array: any numeric or boolean array, any shape; the order in memory does not matter.

    Returns:
        Sixteen hexadecimal digits.

    Example:
        >>> checksum(np.zeros(3, np.float32)) == checksum(np.zeros(4, np.float32))
        False
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.itemsize > 8:
        flat = flat.view(np.uint64)
    words = flat.view(np.dtype(f"u{flat.dtype.itemsize}"))
    total = 0
    steps = np.arange(1, _BLOCK + 1, dtype=np.uint64) * _GOLDEN
    word, shifted = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for start in range(0, words.size, _BLOCK):
        size = min(_BLOCK, words.size - start)
        w, s = word[:size], shifted[:size]
        w[:] = words[start : start + size]
        w += steps[:size]
        w += np.uint64(start * int(_GOLDEN) % 2**64)
        for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
            np.right_shift(w, shift, out=s)
            w ^= s
            w *= multiplier
        np.right_shift(w, _SHIFTS[2], out=s)
        w ^= s
        total += int(w.sum(dtype=np.uint64))
    return f"{total % 2**64:016x}"


class Record(NamedTuple):
    """What a checkpoint knows of one leaf besides its values."""

    dtype: str  # NumPy's name, or jax's of a typed PRNG key, e.g. `key<fry>`
    shape: tuple[int, ...]
    checksum: str = ""  # of the stored array (a PRNG key's key data)
    impl: str = ""  # a typed PRNG key's implementation, empty for ordinary arrays

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Record":
        """Reads what `Record._asdict` became in JSON."""
        record = cls(**fields)
        return record._replace(shape=tuple(record.shape))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def named_leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by name, in the tree's order.

    A name is the key path joined by dots, `inner_params.Dense_0.kernel`. Percent, dot and slash
    inside one key are percent-encoded: Orbax writes `{"a.b": 1}` and `{"a": {"b": 1}}` to one place.

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
    """The record of a leaf without its checksum; reads no values.

    Args:
        name: the leaf's name, for the error.
        leaf: a jax or NumPy array, or a `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: the leaf is not an array of numbers, booleans or PRNG keys.
    """
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
        shape = tuple(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return Record(str(leaf.dtype), shape)
        if jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_:
            return Record(np.dtype(leaf.dtype).name, shape)
        kind = f"dtype {leaf.dtype}"
    else:
        kind = f"type {type(leaf).__name__}"
    raise TypeError(
        f"state: leaf {name!r} has {kind} (value {_shorten(leaf)}); a checkpoint holds arrays of "
        "numbers only: make it jnp.asarray(...), or a static field (pytree_node=False)."
    )


def _shorten(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


def host_copy(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, Record]]:
    """Copies every leaf into host memory of its own.

    The copies never share memory with a leaf: a NumPy view of a jax array on a CPU keeps the buffer
    referenced and so silently cancels its donation.

    Args:
        tree: any pytree of jax or NumPy arrays, typed PRNG keys included.

    Returns:
        Leaf name -> array (key data for a typed PRNG key), and leaf name -> record, checksums unset.

    Raises:
        TypeError: a leaf is not an array (Python scalars and strings included).
        ValueError: a leaf has been donated, or has shards in other processes.
    """
    leaves = named_leaves(tree)
    records = {}
    for name, leaf in leaves.items():
        record = describe(name, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"state: leaf {name!r} is a jax.ShapeDtypeStruct; save arrays.")
        if isinstance(leaf, jax.Array):
            if leaf.is_deleted():
                raise ValueError(
                    f"state: leaf {name!r} has been donated or deleted; save the state that the "
                    "step returned."
                )
            if not leaf.is_fully_addressable:
                raise ValueError(
                    f"state: leaf {name!r} has shards in other processes; gather it first "
                    "(jax.experimental.multihost_utils.process_allgather)."
                )
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                record = record._replace(impl=str(jax.random.key_impl(leaf)))
                leaf = jax.random.key_data(leaf)
            if next(iter(leaf.devices())).platform != "cpu":
                leaf.copy_to_host_async()  # All transfers run at once; the loop below collects them.
            leaves[name] = leaf
        records[name] = record
    return {name: _own_copy(leaf) for name, leaf in leaves.items()}, records


def _own_copy(leaf: Any) -> np.ndarray:
    array = np.array(leaf, copy=True, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def with_checksums(
    records: Mapping[str, Record], arrays: Mapping[str, np.ndarray]
) -> dict[str, Record]:
    """Fills in the checksums, from the arrays of `host_copy`."""
    return {
        name: record._replace(checksum=checksum(arrays[name])) for name, record in records.items()
    }


def first_mismatch(saved: Mapping[str, Record], expected: Mapping[str, Record]) -> str | None:
    """The first leaf in which a checkpoint and a model differ, as one sentence; None if they agree.

    Args:
        saved: the checkpoint's records.
        expected: the model's records (`describe`), in the model's order.
    """
    for name, record in expected.items():
        if name not in saved:
            return f"leaf {name!r}: the model expects {record}, the checkpoint has no such leaf"
        if (saved[name].dtype, saved[name].shape) != (record.dtype, record.shape):
            return f"leaf {name!r}: the model expects {record}, the checkpoint has {saved[name]}"
    for name, record in saved.items():
        if name not in expected:
            return f"leaf {name!r}: the checkpoint has {record}, the model has no such leaf"
    return None


def first_damage(arrays: Mapping[str, np.ndarray], saved: Mapping[str, Record]) -> str | None:
    """The first stored array that does not match its record, as one sentence; None if all do."""
    for name, record in saved.items():
        array = arrays[name]
        if not record.impl and (array.dtype.name, array.shape) != (record.dtype, record.shape):
            found = Record(array.dtype.name, array.shape)
            return f"leaf {name!r}: saved as {record}, read as {found}"
        found = checksum(array)
        if found != record.checksum:
            return (
                f"leaf {name!r}: its values changed on disk (checksum {found}, saved "
                f"{record.checksum})"
            )
    return None


def rebuild(leaf: Any, array: np.ndarray, record: Record) -> Any:
    """A leaf like the template's, with the stored values.

    Args:
        leaf: the template's leaf; its kind (jax or NumPy) and sharding are taken over. Only a leaf
            committed to its devices gives a committed one, as a jitted function retraces otherwise.
        array: the stored values, in host memory.
        record: the stored record.

    Returns:
        A jax array without weak type and with memory of its own (safe to donate), or a NumPy array
        where the template has one.
    """
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    # copy=True: on a CPU jax would otherwise adopt NumPy's buffer, which it can never donate.
    value = jnp.array(array, copy=True)
    if record.impl:
        value = jax.random.wrap_key_data(value, impl=record.impl)
    committed = getattr(leaf, "committed", True)
    if committed and leaf.sharding is not None:
        value = jax.device_put(value, leaf.sharding)
    if str(value.dtype) != record.dtype:
        raise ValueError(
            f"template: {record.dtype} cannot be held (got {value.dtype}); enable jax_enable_x64."
        )
    return value


def stored_size(record: Record) -> int:
    """The number of elements; leaves without any are kept in the records only (Orbax refuses them)."""
    return math.prod(record.shape)
