"""The leaves of a state as a checkpoint knows them: a name and a record each, beside the values.

Records tell a damaged checkpoint (values and records disagree) from another model's (records and
the model disagree); both are reported by the leaf's name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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

    A name is the key path joined by dots, `inner_params.Dense_0.kernel`; that of a tree that is
    one leaf is empty. Percent, dot and slash inside one key are percent-encoded: Orbax writes
    `{"a.b": x}` and `{"a": {"b": x}}` to one place.

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
    return key.replace("%", "%25").replace(".", "%2E").replace("/", "%2F") or "%"


def nested(values: Iterable[tuple[str, Any]]) -> Any:
    """The tree of dicts in which every value is at its name; its keys as they were."""
    tree: dict[str, Any] = {}
    for name, value in values:
        if not name:
            return value
        *parents, last = (
            key.strip("%").replace("%2E", ".").replace("%2F", "/").replace("%25", "%")
            for key in name.split(".")
        )
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def describe(name: str, leaf: Any) -> Record:
    """The record of a leaf (or of a `jax.ShapeDtypeStruct`), without checksum; reads no values.

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
        kind = f"dtype {leaf.dtype}"
    else:
        kind = f"type {type(leaf).__name__}"
    value = " ".join(repr(leaf).split())
    raise TypeError(
        f"state: leaf {name!r} has {kind} (value {value[:40]}); a checkpoint holds arrays of "
        "numbers only: make it jnp.asarray(...), or a static field (pytree_node=False)."
    )


def first_mismatch(saved: Mapping[str, Record], expected: Mapping[str, Record]) -> str | None:
    """The first leaf in which a checkpoint and a model differ, in words; None if they agree."""
    for name, record in expected.items():
        if name not in saved:
            return f"leaf {name!r}: the model expects {record}, the checkpoint has no such leaf"
        if saved[name]._replace(checksum="") != record:
            return f"leaf {name!r}: the model expects {record}, the checkpoint has {saved[name]}"
    for name, record in saved.items():
        if name not in expected:
            return f"leaf {name!r}: the checkpoint has {record}, the model has no such leaf"
    return None
