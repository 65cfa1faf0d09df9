"""A run goes on from its checkpoint on other devices, and other axes, as if nothing had been.

"auto" follows the adjoint's residual, of which `data_parallel` has an estimate: so it is `whole`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from sharding_problems import largest_difference, setting, solver

import bilevel_flax as bf
from bilevel_flax import sharding
from bilevel_flax.checkpoints import Checkpointer

STEPS = 3  # on each
MESHES = {
    "soba": (None, "data=8", "fsdp=2", None),
    "saba": (None, "fsdp=8", "data=2", None),
    "auto": (None, "data=2,fsdp=4", None),
}


@functools.cache
def task() -> Any:
    return setting("plain")


class OnDevices:
    """A method where a mesh puts it; None: on one device, without any."""

    def __init__(self, method: str, text: str | None):
        self._layout, problem, count = None, task().problem, 1
        if text is not None:
            count = int(np.prod([int(part.split("=")[1]) for part in text.split(",")]))
            mesh = sharding.make_mesh(text, devices=jax.devices()[:count])
            self._layout = sharding.Layout(mesh, None, problem)
            whole = method == "auto"
            problem = sharding.whole(problem) if whole else sharding.data_parallel(problem, mesh)
        self._count, self._solver = count, solver(method, task(), problem)
        self._update = jax.jit(self._solver.update)

    def start(self) -> bf.TrainState:
        state = self._solver.init(task().inner_params, task().outer_params)
        return state if self._layout is None else self._layout.place_state(state)

    def go_on(self, state: bf.TrainState, steps: int) -> bf.TrainState:
        for _ in range(steps):
            batch = task().batch(int(state.step))
            if self._layout is not None:
                put = self._layout.batches(batch)
                batch = jax.device_put(batch, put)
            state, info = self._update(state, batch)
            assert info.ok
        return state

    def lies_right(self, state: bf.TrainState) -> bool:
        devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
        return devices == {self._count}


@pytest.mark.parametrize("method", MESHES)
def test_a_run_goes_on_on_other_devices(method: str, tmp_path: Path):
    alone = OnDevices(method, None)
    expected = alone.go_on(alone.start(), STEPS * len(MESHES[method]))
    state = None
    for text in MESHES[method]:
        here = alone if text is None else OnDevices(method, text)
        start = here.start()
        with Checkpointer(tmp_path) as checkpoints:
            if state is not None:
                restored = checkpoints.restore(start)
                assert restored is not None
                start = restored.state
                assert largest_difference(state, jax.tree.map(np.array, start)) == 0
            assert here.lies_right(start)
            after = here.go_on(start, STEPS)
            checkpoints.save(int(after.step), after)
        state = jax.tree.map(np.array, after)
    assert largest_difference(state, jax.tree.map(np.array, expected)) < 1e-6
