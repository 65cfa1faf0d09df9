"""One checkpoint on disk: items that Orbax alone reads, and what says that they are sound.

    <step>/inner_params, adjoint, outer_params, model_state    z, v, x and the model's own state
    <step>/state        every other leaf: optimisers, the estimator's memory, step, key
    <step>/meta         the user's metadata (JSON)
    <step>/checksums    {"format", "step", "leaves", "files", "digest"} (JSON)

The first five are pytrees of nested dicts with each leaf at its name (`records.named_leaves`; a
tree that is one leaf is at "value"). Leaves without elements, which Orbax refuses, are in `leaves`
alone. `digest` is a hash of both documents. Format 1 had all leaves in `state` and one document.

Written and read by Orbax's handlers: `CheckpointManager` and `Checkpointer` wait at barriers, for
minutes where one process cannot write, and say there what went wrong to none of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.checkpoints.errors import CheckpointError, Damaged, reason
from bilevel_flax.checkpoints.files import describe_files, first_damaged_file
from bilevel_flax.checkpoints.records import Record

if TYPE_CHECKING:
    from etils import epath

PARTS = ("inner_params", "adjoint", "outer_params", "model_state")
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax skips such directories, and deletes them.
_REST, _META, _CHECKSUMS = "state", "meta", "checksums"
_VERSION = 2
_TESTED = ((0, 11, 24), (0, 12, 8))  # versions of Orbax, the first and the last


@functools.cache
def orbax() -> Any:
    """Orbax's module, imported when it is first needed.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise CheckpointError(
            "checkpoints need orbax-checkpoint, which cannot be imported: pip install "
            f"'bilevel-flax[train]' ({reason(error)})"
        ) from error
    numbers = (part for part in ocp.__version__.split(".")[:3] if part.isdecimal())
    if not _TESTED[0] <= tuple(map(int, numbers)) <= _TESTED[1]:
        first, last = (".".join(map(str, version)) for version in _TESTED)
        warnings.warn(
            f"orbax-checkpoint {ocp.__version__} is not among the versions that bilevel_flax was "
            f"tested with ({first} to {last})",
            stacklevel=2,
        )
    return ocp


def item_names(leaf_names: Iterable[str]) -> list[str]:
    """The items of a checkpoint with these leaves, the documents included."""
    return list(dict.fromkeys([*(_place(name)[0] for name in leaf_names), _META, _CHECKSUMS]))


def _place(name: str, version: int = _VERSION) -> list[str]:
    """Where a leaf is: the item, and the keys inside it."""
    if version == 1:
        return [_REST, *name.split(".")]
    part, _, rest = name.partition(".")
    if part in PARTS:
        return [part, *(rest or "value").split(".")]
    return [_REST, *(name or "value").split(".")]


def _placed(values: Mapping[str, Any], version: int = _VERSION) -> dict[str, Any]:
    """Item -> nested dicts."""
    items: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = _place(name, version)
        node = items
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return items


class _Owned(np.ndarray):
    """An array that nobody changes while it is written: the deep copy that Orbax makes is itself.

    A true copy goes into fresh memory, which the system clears first: half of the time of a save.
    """

    def __deepcopy__(self, memo: Any) -> _Owned:
        return self


def write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Writes what this process has of the arrays."""
    items = _placed(
        {
            name: array.view(_Owned) if isinstance(array, np.ndarray) else array
            for name, array in arrays.items()
            if array.size
        }
    )
    futures: list[Any] = []

    async def start() -> None:
        for item, tree in items.items():
            args = orbax().args.PyTreeSave(tree)
            futures.extend(await _handler().async_save(path / item, args=args) or ())

    failures = []
    try:
        asyncio.run(start())
    except Exception as error:
        failures.append(error)
    for future in futures:  # All of them: what failed is deleted, and must not be written to then.
        try:
            future.result()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


def finish(
    path: epath.Path, step: int, records: Mapping[str, Record], meta: Mapping[str, Any]
) -> None:
    """Completes a checkpoint, on one process, once all have written their arrays."""
    names = {name for name, record in records.items() if 0 not in record.shape}
    items = [item for item in item_names(names) if item not in (_META, _CHECKSUMS)]
    for item in items:
        _handler().finalize(path / item)
    document = {
        "format": _VERSION,
        "step": step,
        "leaves": {name: record._asdict() for name, record in records.items()},
        "files": describe_files(path, items),
    }
    document["digest"] = _digest({**document, "meta": meta})
    for item, content in ((_META, meta), (_CHECKSUMS, document)):
        orbax().JsonCheckpointHandler().save(path / item, args=orbax().args.JsonSave(dict(content)))


def _handler() -> Any:
    # One replica writes a shard: to slice it among all of them would run on the devices, under the
    # training.
    types = orbax().type_handlers
    registry = types.create_type_handler_registry(
        (jax.Array, types.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, types.NumpyHandler()),
    )
    return orbax().PyTreeCheckpointHandler(type_handler_registry=registry)


class Document(NamedTuple):
    """All of a checkpoint but its arrays."""

    version: int
    meta: dict[str, Any]
    leaves: dict[str, Record]
    files: dict[str, list[int]]


def read_document(path: epath.Path, step: int) -> Document:
    """Reads and verifies everything but the arrays.

    Raises:
        Damaged: it cannot be read, or is not what was written.
    """
    try:
        read = orbax().JsonCheckpointHandler().restore
        document = dict(read(path / _META))
        if (path / _CHECKSUMS).exists():  # since format 2
            document = {"meta": document, **read(path / _CHECKSUMS)}
    except MemoryError:
        raise
    except Exception as error:
        raise Damaged(f"its metadata cannot be read ({reason(error)})") from error
    if document.pop("digest", None) != _digest(document):
        raise Damaged("its metadata have changed on disk (their digest differs)")
    version = document["format"]
    if version > _VERSION:
        raise Damaged(f"it has format {version}, this program reads 1 to {_VERSION}")
    if document["step"] != step:
        raise Damaged(f"it was saved as step {document['step']}")
    leaves = {name: Record.from_json(r) for name, r in document["leaves"].items()}
    return Document(version, document["meta"], leaves, document.get("files", {}))


def check_files(path: epath.Path, document: Document) -> None:
    """Raises Damaged if a file is not as it was written."""
    damage = first_damaged_file(path, document.files)
    if damage is not None:
        raise Damaged(damage)


def read_arrays(
    path: epath.Path,
    document: Document,
    names: Iterable[str] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, np.ndarray | jax.Array]:
    """Reads arrays into host memory, or to devices; nothing is verified.

    Raises:
        Damaged: an array cannot be read.
    """
    shardings = shardings or {}
    names = list(document.leaves if names is None else names)
    items = {_place(name, document.version)[0] for name in names}
    arrays: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for name, record in document.leaves.items():
        if _place(name, document.version)[0] in items:
            # Targets of the saved dtype: Orbax casts to any other without a word.
            array = targets[name] = np.empty(record.shape, jnp.dtype(record.dtype))
            if name in shardings:
                struct = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name])
                targets[name] = struct
            if not array.size:
                arrays[name] = targets.pop(name)
    try:
        # In a thread: under a running event loop (a notebook) Orbax patches asyncio, or gives up.
        with quiet_orbax(), ThreadPoolExecutor(1) as thread:
            trees = {
                item: thread.submit(_restore, path / item, tree).result()
                for item, tree in _placed(targets, document.version).items()
            }
    except MemoryError:
        raise
    except Exception as error:
        raise Damaged(f"its arrays cannot be read ({reason(error)})") from error
    for name in targets:
        array = functools.reduce(lambda tree, key: tree[key], _place(name, document.version), trees)
        arrays[name] = array if isinstance(array, jax.Array) else np.asarray(array)
    return {name: arrays[name] for name in names}


def _restore(path: epath.Path, targets: Any) -> Any:
    restore_args = orbax().checkpoint_utils.construct_restore_args(targets)
    return _handler().restore(
        path, args=orbax().args.PyTreeRestore(targets, restore_args=restore_args)
    )


def plain_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the metadata as JSON gives it back.

    Raises:
        TypeError: it holds something that JSON does not.
    """
    try:
        return json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"meta: {error}; JSON holds dicts, lists, strings, numbers, True, False and None "
            "(float(...) or .tolist() turns arrays into such)."
        ) from error


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's log from the user's terminal, where no one asked for it.

    It logs everything through absl's one logger, with tracebacks of failures that it raises as
    well. Only records from its own files are dropped, only while one of our operations runs, and
    not if the logger `absl` has been set to INFO or below. No level or handler changes.
    """
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        asked_for = logging.NOTSET < logger.level <= logging.INFO
        return asked_for or "orbax" not in pathlib.Path(record.pathname).parts

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
