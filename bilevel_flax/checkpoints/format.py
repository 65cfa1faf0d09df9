"""One checkpoint on disk: what is written for a step, and how it is read and verified.

    <step>/state    nested dicts of arrays, every leaf at its name (`fingerprint.named_leaves`);
                    each process writes its shards (`ocdbt.process_<i>`), one index finds them all
    <step>/meta     JSON: {"format", "step", "meta", "leaves", "digest"}

`leaves` holds the records of all leaves, `digest` is a hash of the rest of the document. Leaves
without elements are kept in `leaves` only, for Orbax refuses them.
"""

import contextlib
import gc
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bilevel_flax.checkpoints import checksum as fingerprint
from bilevel_flax.checkpoints.checksum import Record

ITEMS = ("state", "meta")
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax skips such directories, and deletes them.
_VERSION = 1
_SETTLE_SECONDS = 0.1  # After a failure the other reads and writes of an operation are soon over.


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one line for the user."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint, but of another model."""


class Damaged(Exception):
    """One checkpoint cannot be used; the message says why, in one line."""


def write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Writes what this process has of the arrays.

    Args:
        path: the step's directory, with `state` in it.
        arrays: leaf name -> array in host memory, the caller's until this returns.
    """
    stored = _nested({name: array for name, array in arrays.items() if array.size})
    _handler().save(path / "state", args=ocp.args.PyTreeSave(stored))


def finish(
    path: epath.Path, step: int, records: Mapping[str, Record], meta: Mapping[str, Any]
) -> None:
    """Completes a checkpoint, on one process, once all have written their arrays.

    Args:
        path: the step's directory, with `state` and `meta` in it.
        step: the step.
        records: leaf name -> record with its checksum.
        meta: the user's metadata, plain JSON.
    """
    _handler().finalize(path / "state")
    document = {
        "format": _VERSION,
        "step": step,
        "meta": meta,
        "leaves": {name: record._asdict() for name, record in records.items()},
    }
    document["digest"] = _digest(document)
    ocp.JsonCheckpointHandler().save(path / "meta", args=ocp.args.JsonSave(document))


def _handler() -> ocp.PyTreeCheckpointHandler:
    # The arrays are ours: Orbax need not copy them. One replica writes a shard; slicing it among
    # all of them would run on the devices, under the training.
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (jax.Array, types.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, types.NumpyHandler(deepcopy_host_arrays=False)),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def read_document(path: epath.Path, step: int) -> tuple[dict[str, Any], dict[str, Record]]:
    """Reads and verifies everything but the arrays.

    Args:
        path: the step's directory.
        step: the step that it should be.

    Returns:
        The user's metadata and the records.

    Raises:
        Damaged: it cannot be read, or is not what was written.
    """
    try:
        document = dict(ocp.JsonCheckpointHandler().restore(path / "meta"))
    except MemoryError:
        raise
    except Exception as error:
        raise Damaged(f"its metadata cannot be read ({reason(error)})") from error
    if document.pop("digest", None) != _digest(document):
        raise Damaged("its metadata have changed on disk (their digest differs)")
    if document["format"] != _VERSION:
        raise Damaged(f"it has format {document['format']}, this program reads {_VERSION}")
    if document["step"] != step:
        raise Damaged(f"it was saved as step {document['step']}")
    records = {name: Record.from_json(r) for name, r in document["leaves"].items()}
    return document["meta"], records


def read_arrays(
    path: epath.Path,
    records: Mapping[str, Record],
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, np.ndarray | jax.Array]:
    """Reads the arrays into host memory, or to devices; nothing is verified.

    Args:
        path: the step's directory.
        records: what they should be, by leaf name.
        shardings: of those of which this process reads its own pieces only.

    Raises:
        Damaged: an array cannot be read.
    """
    shardings = shardings or {}
    empty = {name: np.empty(r.shape, jnp.dtype(r.dtype)) for name, r in records.items()}
    # Targets of the saved dtype: Orbax casts to any other without a word.
    targets = _nested(
        {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name])
            if name in shardings
            else array
            for name, array in empty.items()
            if array.size
        }
    )
    args = ocp.args.PyTreeRestore(
        targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
    )
    try:
        # In a thread: under a running event loop (a notebook) Orbax patches asyncio, or gives up.
        with quiet_orbax(), ThreadPoolExecutor(1) as thread:
            tree = thread.submit(_handler().restore, path / "state", args=args).result()
        return {n: _at(tree, n) if array.size else array for n, array in empty.items()}
    except MemoryError:
        raise
    except Exception as error:
        raise Damaged(f"its arrays cannot be read ({reason(error)})") from error


def first_damage(
    arrays: Mapping[str, np.ndarray | jax.Array],
    sums: Mapping[str, int],
    saved: Mapping[str, Record],
) -> str | None:
    """The first array that does not match its record, in words; None if all do.

    Args:
        arrays: by leaf name.
        sums: of all processes, by leaf name.
        saved: what they should be.
    """
    for name, record in saved.items():
        array = arrays[name]
        if (array.dtype.name, array.shape) != (record.dtype, record.shape):
            found = Record(array.dtype.name, array.shape, record.impl)
            return f"leaf {name!r} was saved as {record} and reads as {found}"
        if fingerprint.as_checksum(sums[name]) != record.checksum:
            return f"leaf {name!r} has changed on disk (its checksum differs)"
    return None


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


def reason(error: BaseException) -> str:
    """An error in one short line; Orbax's and tensorstore's run over many."""
    text = " ".join(str(error).split())
    for sign, plain in _PLAIN_REASONS.items():
        if sign in text:
            return plain
    if not isinstance(error, RuntimeError):  # which every library raises with a sentence
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


_PLAIN_REASONS = {
    "No space left on device": "no space left on the disk",
    "Disk quota exceeded": "the disk quota is exceeded",
    "File too large": "a file would exceed the size limit",
    "Read-only file system": "the file system is read-only",
    "Permission denied": "no permission to write there",
}


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax from writing to the user's terminal, and lets a failure of it come to rest.

    It logs everything through absl's one logger, with tracebacks of failures that it raises as
    well. Only records from its own files are dropped, only while one of our operations runs, and
    not if the logger `absl` has been set to INFO or below. No level or handler changes.

    At the first failure among its concurrent reads or writes it closes their event loop; every
    other one then finds the loop closed, which Python prints as an exception that nobody can catch,
    or fails as the first did, which asyncio logs when the task is deleted.
    """
    logger, show = logging.getLogger("absl"), sys.unraisablehook
    tasks = logging.getLogger("asyncio")

    def retrieved(record: logging.LogRecord) -> bool:
        return "never retrieved" not in record.getMessage()

    def keep(record: logging.LogRecord) -> bool:
        asked_for = logging.NOTSET < logger.level <= logging.INFO
        return asked_for or "orbax" not in epath.Path(record.pathname).parts

    def show_others(unraisable: "sys.UnraisableHookArgs") -> None:
        code = getattr(unraisable.object, "cr_code", None)
        from_orbax = code is not None and "orbax" in epath.Path(code.co_filename).parts
        if str(unraisable.exc_value) != "Event loop is closed" and not from_orbax:
            show(unraisable)

    logger.addFilter(keep)
    tasks.addFilter(retrieved)
    sys.unraisablehook = show_others
    try:
        yield
    except Exception:
        time.sleep(_SETTLE_SECONDS)
        gc.collect()
        raise
    finally:
        logger.removeFilter(keep)
        tasks.removeFilter(retrieved)
        sys.unraisablehook = show


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


def _at(tree: Any, name: str) -> np.ndarray | jax.Array:
    for key in name.split("."):
        tree = tree[key]
    return tree if isinstance(tree, jax.Array) else np.asarray(tree)
