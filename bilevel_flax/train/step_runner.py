"""Chunks of updates inside one compiled loop, so that small problems are not bound by Python.

A chunk is a `lax.while_loop` (what `lax.scan` compiles to) whose number of steps is an argument:
one trace serves every chunk length, and a direction that is not finite ends the chunk at its step.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax import data, deprecated
from bilevel_flax.base import Batch, BilevelSolver, Info, TrainState
from bilevel_flax.sharding import Layout, batch_share
from bilevel_flax.train import multihost as distributed
from bilevel_flax.train.device_feed import DeviceFeed, minibatch


class StepRunner:
    """Runs a solver over two finite sums, chunk by chunk.

    Args:
        solver: any `BilevelSolver`.
        inner: the inner data's minibatches.
        outer: the outer data's.
        seed: of the order in which minibatches come; a pure function of (seed, step).
        on_device: keep all data on the device (True), stream it (False), or decide by size (None).
        capacity: the most steps in a chunk.
        target_seconds: how long a chunk should take, so that signals and logs are served.
        layout: where state and minibatches lie on many devices: hand over states placed by
            `layout.place_state`. None: on JAX's default device.
        compiled_as: one with the same solver and settings, over data of the same shapes, whose
            compiled programs serve here, too.
        paired: as in `Task`.

    Raises:
        ValueError: the layout's devices do not divide a minibatch; `paired` with sides of other
            numbers of minibatches, or a solver that takes others of each.

    Attributes:
        CLOCKS: the names of the three clocks below.
        samplers: (inner, outer), whose `state()` belongs into a checkpoint.
        on_device: what was decided.
        compile_seconds: spent in compilation so far.
        seconds: wall time in updates and refreshes, compilation and data transfers at the start
            apart.
        cpu_seconds: CPU time of the same.
    """

    CLOCKS = ("seconds", "cpu_seconds", "compile_seconds")

    def __init__(
        self,
        solver: BilevelSolver,
        inner: data.FiniteSum,
        outer: data.FiniteSum,
        *,
        seed: int = 0,
        on_device: bool | None = None,
        capacity: int = 1000,
        target_seconds: float = 0.5,
        layout: Layout | None = None,
        compiled_as: StepRunner | None = None,
        paired: bool = False,
    ):
        if layout is not None:
            for name, side in (("inner", inner), ("outer", outer)):
                layout.batches(side.batches, name=f"the {name} data ")
        if on_device is None:
            shares = 1 if layout is None else batch_share(layout.mesh)
            on_device = data.fits_on_device((inner.nbytes + outer.nbytes) // shares)
            on_device = on_device and not (inner.streamed or outer.streamed)
        # What a clock or a memory says differs from process to process; what they run must not.
        self._processes = distributed.Channel("runner")
        on_device = self._processes.broadcast(on_device)
        sums, seeds = (inner, outer), (2 * seed, 2 * seed + (not paired))
        if paired and (inner.num_batches != outer.num_batches or len(set(solver.batches)) > 1):
            raise ValueError(
                f"paired minibatches: {inner.num_batches} inner and {outer.num_batches} outer "
                f"ones, of which {solver.name} takes {solver.batches} an update: they must agree"
            )
        self.samplers = tuple(
            data.Sampler(finite_sum.num_batches, side_seed, per_step)
            for finite_sum, side_seed, per_step in zip(sums, seeds, solver.batches, strict=True)
        )
        self.on_device = on_device
        self.compile_seconds = self.seconds = self.cpu_seconds = 0.0
        self._solver, self._sums = solver, sums
        self._feeds = tuple(
            DeviceFeed(finite_sum, sampler, on_device, capacity, layout)
            for finite_sum, sampler in zip(sums, self.samplers, strict=True)
        )
        self._layout = layout
        self._capacity = capacity
        self._target_seconds = target_seconds
        self._count = 1  # the next chunk's length, adapted to the measured speed
        self._chunk: Any = None if compiled_as is None else compiled_as._chunk
        self._passes: dict[str, Any] = {} if compiled_as is None else compiled_as._passes

    @property
    def compiled(self) -> bool:
        """Whether `run` is ready to go."""
        return self._chunk is not None

    def compile(self, state: TrainState, start: int) -> None:
        """Compiles the chunk unless that is done; `run` does so itself.

        Args:
            state: as for `run`; it is not used up.
            start: `int(state.step)`.

        Raises:
            ValueError: whatever the solver and the oracles refuse about the losses.
        """
        if self._chunk is None:
            args = self.arguments(start, start + 1)
            self._chunk = self._compiled(self._make_chunk(), state, *args, returns_more=True)

    def run(self, state: TrainState, start: int, stop: int) -> tuple[TrainState, Info]:
        """Updates from `state.step == start`, at most up to `stop`: one chunk.

        Args:
            state: donated; use the returned one.
            start: `int(state.step)`, known to the caller without asking the device.
            stop: the chunk ends there at the latest.

        Returns:
            The new state and the chunk's Info, NumPy leaves [steps taken]. If the last entry of
            `info.finite` has a False, the state is that before the failed step.
        """
        self.compile(state, start)
        args = self.arguments(start, min(stop, start + self._count))
        before = self.seconds
        with self.clocks_running():
            state, infos, done = self._chunk(state, *args)
            done = int(done)
        pace = max((self.seconds - before) / done, 1e-9)
        count = int(np.clip(self._target_seconds / pace, 1, self._capacity))
        self._count = self._processes.broadcast(count)
        return state, jax.tree.map(lambda leaf: np.asarray(leaf)[:done], infos)

    def refresh(self, state: TrainState) -> tuple[TrainState, float]:
        """One chunk of the full pass that is due.

        Returns:
            The new state and the gradient units spent.
        """
        cursor = int(self._solver.refresh_cursor(state))
        inner_batches = self._sums[0].num_batches
        side = 0 if cursor < inner_batches else 1
        first = cursor - side * inner_batches
        count = min(self._sums[side].num_batches - first, self._capacity)
        ids = self._padded(np.arange(first, first + count, dtype=np.int32))
        if self.on_device:
            batches, rows = self._feeds[side].batches, ids
        else:
            count = min(count, self._feeds[side].capacity)
            chosen = np.minimum(
                first + np.arange(self._feeds[side].capacity), len(self._sums[side].weights) - 1
            )
            batches = self._feeds[side].placed(chosen)
            rows = self._padded(np.arange(count, dtype=np.int32))
        args = (batches, *self._everywhere(rows, ids, np.int32(count)))
        name = ("inner", "outer")[side]
        if name not in self._passes:
            self._passes[name] = self._compiled(self._make_pass(name), state, *args)
        with self.clocks_running():
            state = jax.block_until_ready(self._passes[name](state, *args))
        return state, count * self._solver.refresh_units[side]

    @contextlib.contextmanager
    def clocks_running(self) -> Iterator[None]:
        """Adds what the block takes to `seconds` and `cpu_seconds`."""
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began

    def rewind(self) -> None:
        """Sets the clocks to zero, for another run of the compiled chunk from step 0."""
        self.compile_seconds = self.seconds = self.cpu_seconds = 0.0
        self._count = 1

    def arguments(self, start: int, stop: int) -> tuple[Any, ...]:
        """What the compiled chunk takes for updates start .. stop - 1, or as many as are there."""
        stop = min([stop, *(feed.seek(start) for feed in self._feeds)])
        positions = [values for feed in self._feeds for values in feed.positions(start, stop)]
        padded = [self._padded(values) for values in positions]
        rest = self._everywhere(*padded, np.int32(stop - start))
        return *(feed.batches for feed in self._feeds), *rest

    def close(self) -> None:
        """Ends the background threads of streamed data."""
        for feed in self._feeds:
            feed.close()

    def _padded(self, values: np.ndarray) -> np.ndarray:
        out = np.zeros((self._capacity, *values.shape[1:]), np.int32)
        out[: len(values)] = values
        return out

    def _everywhere(self, *values: Any) -> tuple:
        return values if self._layout is None else tuple(self._layout.place_everywhere(values))

    def _compiled(self, function, state, *args, returns_more: bool = False):
        # Compiled ahead of time: the seconds are known, and a second trace is an error, not a
        # slow run.
        began = time.perf_counter()
        pinned = {}
        if self._layout is not None:
            here, everywhere = self._layout.state(state), self._layout.everywhere
            others = jax.tree.map(lambda leaf: leaf.sharding, args)
            out = jax.eval_shape(function, state, *args)
            pinned["in_shardings"] = (here, *others)
            pinned["out_shardings"] = (
                here if isinstance(out, TrainState) else (here, everywhere, everywhere)
            )
        compiled = jax.jit(function, donate_argnums=0, **pinned).lower(state, *args).compile()
        self.compile_seconds += time.perf_counter() - began
        return compiled

    def _constrained(self, state: TrainState) -> TrainState:
        # XLA is free to choose where a loop's carry lies; it must not move it there and back.
        return state if self._layout is None else self._layout.constrained(state)

    def _make_chunk(self):
        solver, capacity = self._solver, self._capacity
        constrained = self._constrained

        def chunk(state, inner, outer, inner_rows, inner_ids, outer_rows, outer_ids, count):
            # Inlined, and traced once for both of its uses below.
            @functools.partial(jax.jit, inline=True)
            def update(i, state):
                batch = Batch(
                    minibatch(inner, inner_rows[i]),
                    minibatch(outer, outer_rows[i]),
                    inner_ids[i],
                    outer_ids[i],
                )
                state, info = solver.update(state, batch)
                return constrained(state), info

            _, one = jax.eval_shape(update, jnp.int32(0), state)
            infos = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), one)

            def unfinished(carry):
                i, _, _, alive = carry
                return (i < count) & alive

            def body(carry):
                i, state, infos, _ = carry
                state, info = update(i, state)
                infos = jax.tree.map(lambda buffer, leaf: buffer.at[i].set(leaf), infos, info)
                alive = info.finite.inner & info.finite.adjoint & info.finite.outer
                return i + 1, state, infos, alive

            done, state, infos, _ = jax.lax.while_loop(
                unfinished, body, (jnp.int32(0), state, infos, jnp.bool_(True))
            )
            return state, infos, done

        return chunk

    def _make_pass(self, side: str):
        solver, constrained = self._solver, self._constrained

        def full_pass(state, batches, rows, ids, count):
            def body(i, state):
                one = minibatch(batches, rows[i])
                state = solver.refresh(state, Batch(**{side: one, f"{side}_id": ids[i]}))
                return constrained(state)

            return jax.lax.fori_loop(0, count, body, state)

        return full_pass


__getattr__ = deprecated.names(__name__)
