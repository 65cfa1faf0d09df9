"""Data that does not fit on the device: the next chunk is gathered and sent while one computes."""

import contextlib
import os
import pathlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from bilevel_flax.data.finite_sum import FiniteSum, gather

_SHARE = 0.5  # of the free memory: tables, optimizer states and activations need the rest


class Prefetcher(Iterator):
    """Computes `make(item)` for each item in a background thread, at most `depth` ahead.

    An exception in the thread is raised by the `next` that would have returned the value. Closing
    (or dropping the last reference, or leaving a `with` block) ends the thread.

    Args:
        make: called in the thread, in order.
        items: what for; drawn from in the thread.
        depth: how many values may wait, at least 1.

    Raises:
        ValueError: `depth` is below 1.

    Example:
        >>> with Prefetcher(lambda i: i * i, range(3)) as squares:
        ...     list(squares)
        [0, 1, 4]
    """

    def __init__(self, make: Callable[[Any], Any], items: Iterable[Any], depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._stop = threading.Event()
        # The thread must not refer to self: then dropping the iterator could never end it.
        self._thread = threading.Thread(
            target=_work,
            args=(make, items, self._results, self._slots, self._stop),
            name="bilevel_flax-prefetch",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _end, self._stop, self._slots)
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        value, error = self._results.get()
        if error is not None:
            self.close()
            raise error
        self._slots.release()
        return value

    def close(self) -> None:
        """Ends the thread and drops what it had made; later `next` calls stop."""
        self._finalizer()
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def chunks(
    finite_sum: FiniteSum,
    ids_chunks: Iterable[np.ndarray],
    *,
    device: Any = None,
    depth: int = 2,
) -> Prefetcher:
    """Gathers the minibatches of one chunk of updates after the other, and sends them ahead.

    Args:
        finite_sum: the data, on the host.
        ids_chunks: int arrays, [k] or [k, K], a chunk each, as `Sampler.ids` returns them.
        device: a `Device` or `Sharding` for the arrays (or a pytree of them); None: the default.
        depth: chunks that may wait on the device, at least 1.

    Returns:
        An iterator (and context manager) of pytrees like `finite_sum.batches`, leaves
        `[*ids.shape, batch_size, ...]` on the device.

    Raises:
        ValueError: from `next`, when an id is out of range.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> parts = bf.data.partition({"x": np.arange(8)}, batch_size=2)
        >>> with bf.data.chunks(parts, [np.array([0, 1]), np.array([2, 3])]) as chunks:
        ...     print([chunk["x"].shape for chunk in chunks])
        [(2, 2), (2, 2)]
    """

    def send(ids: np.ndarray) -> Any:
        return jax.device_put(gather(finite_sum, ids), device)

    return Prefetcher(send, ids_chunks, depth)


def fits_on_device(nbytes: int, limit: int | None = None, device: Any = None) -> bool:
    """Whether data may stay on the device for the whole run.

    Args:
        nbytes: bytes of all data together (`FiniteSum.nbytes`, summed).
        limit: the most it may take, in bytes; None: half of what the device has free, or, where the
            backend does not say (the CPU's does not), half of the host's memory.
        device: which; None: the default one.

    Returns:
        nbytes <= limit.

    Example:
        >>> import bilevel_flax as bf
        >>> bf.data.fits_on_device(3 * 10**9, limit=2 * 10**9)
        False
    """
    if limit is None:
        stats = (device or jax.local_devices()[0]).memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        else:
            free = _host_memory()
        limit = int(_SHARE * free)
    return nbytes <= limit


def _work(make, items, results, slots, stop) -> None:
    try:
        iterator = iter(items)
        while True:
            slots.acquire()
            if stop.is_set():
                return
            try:
                item = next(iterator)
            except StopIteration:
                results.put((None, StopIteration()))
                return
            results.put((make(item), None))
    except StopIteration as error:
        # Raised by `make`: passed on as it is, it would end the consumer's loop without a word.
        results.put((None, RuntimeError(f"prefetch: make raised {error!r}")))
    except BaseException as error:  # noqa: BLE001  whatever it is, the consumer must hear of it
        results.put((None, error))


def _end(stop: threading.Event, slots: threading.Semaphore) -> None:
    stop.set()
    slots.release()


def _host_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container's limit is often far below the machine's memory, and going over it is a kill.
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
