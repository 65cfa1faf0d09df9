"""What the processes of `multihost_test.py` do; each function runs in every process."""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bilevel_flax.checkpoints.checkpointer import Checkpointer
from bilevel_flax.train import multihost as distributed

SHAPES = {
    "z": (128, 48),
    "v": (16, 24),
    "table": (3, 64, 48),
    "x": (64,),
    "moment": (16,),
    "rows": (3, 8),
}
SPECS = {
    "z": ("fsdp", "data"),
    "v": ("fsdp",),
    "table": (None, "fsdp"),
    "x": (("data", "fsdp"),),
    "moment": (None,),
    "rows": (None, "data"),
}


def values(step: int) -> dict[str, np.ndarray]:
    """A state that its step determines."""
    rng = np.random.default_rng(step)
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return found | {"table": found["table"].astype(jnp.bfloat16), "step": np.int32(step)}


def shardings(mesh: jax.sharding.Mesh | None) -> dict[str, NamedSharding | None]:
    names = [*SHAPES, "step"]
    if mesh is None:
        return dict.fromkeys(names)
    return {name: NamedSharding(mesh, PartitionSpec(*SPECS.get(name, ()))) for name in names}


def mesh_of(text: str | None) -> jax.sharding.Mesh | None:
    if text is None:
        return None
    data, fsdp = (int(part) for part in text.split("x"))
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=kinds)


def state(step: int, text: str | None) -> dict[str, jax.Array]:
    """On a mesh "2x4", or on one device (None)."""
    mesh = mesh_of(text)
    placed = {}
    for name, sharding in shardings(mesh).items():
        array = values(step)[name]
        placed[name] = (
            jnp.asarray(array)
            if sharding is None
            else jax.make_array_from_callback(
                array.shape, sharding, lambda index, array=array: array[index]
            )
        )
    placed["key"] = jax.random.key(step)
    if mesh is not None:
        data = np.asarray(jax.random.key_data(placed["key"]))
        whole = NamedSharding(mesh, PartitionSpec())
        data = jax.make_array_from_callback(data.shape, whole, lambda index: data[index])
        placed["key"] = jax.random.wrap_key_data(data)
    return placed


def same(found: dict[str, jax.Array], step: int) -> bool:
    """Whether every shard that is here is that of the state of `step`, bit for bit."""
    truth = values(step) | {"key": np.asarray(jax.random.key_data(jax.random.key(step)))}
    for name, leaf in found.items():
        if name == "key":
            leaf = jax.random.key_data(leaf)
        for shard in leaf.addressable_shards:
            if np.asarray(shard.data).tobytes() != truth[name][shard.index].tobytes():
                return False
    return True


def _checkpointer(directory: str, **more: Any) -> Checkpointer:
    return Checkpointer(directory, processes=distributed.Channel("checkpoints"), **more)


def save(directory: str, text: str, steps: int) -> None:
    """Saves and reads what it saved, on the mesh that it has and on another."""
    with _checkpointer(directory, keep=2, on_event=print) as checkpointer:
        for step in range(1, steps + 1):
            checkpointer.save(step, state(step, text), {"at": step})
        for mesh in (text, "x".join(reversed(text.split("x")))):
            restored = checkpointer.restore(state(0, mesh))
            assert restored is not None and restored.step == steps
            assert same(restored.state, steps) and restored.meta == {"at": steps}
            for name, leaf in state(0, mesh).items():
                assert restored.state[name].sharding == leaf.sharding, name
    print("saved", sorted(path.name for path in Path(directory).iterdir()))


def restore(text: str | None, *directories: str) -> None:
    """Restores from every directory and says the step; exits with 3 where a value is wrong."""
    step = jax.jit(lambda s: {**s, "z": s["z"] * 2}, donate_argnums=0)
    for directory in directories:
        with _checkpointer(directory, on_event=lambda line: print("event:", line)) as checkpointer:
            restored = checkpointer.restore(state(0, text))
        assert restored is not None and restored.meta == {"at": restored.step}
        if not same(restored.state, restored.step):
            sys.exit(3)
        template = state(0, text)
        for name, leaf in restored.state.items():
            assert leaf.sharding.is_equivalent_to(template[name].sharding, leaf.ndim), name
        if directory == directories[0]:
            # A compiled step takes the restored state, and really has it donated.
            moved = step(restored.state)
            assert restored.state["z"].is_deleted()
            assert np.isfinite(np.asarray(moved["z"].addressable_data(0))).all()
        print(f"restored {restored.step} from {Path(directory).name}")


def restore_another_model(directory: str, text: str) -> None:
    """A model whose v has another shape."""
    template = state(0, text)
    template["v"] = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=template["v"].sharding)
    with _checkpointer(directory, on_event=print) as checkpointer:
        checkpointer.restore(template)


def fail_on_one(directory: str) -> None:
    """Process 1 cannot write: nobody gets a checkpoint, everybody hears why, and goes on."""
    import orbax.checkpoint as ocp

    original = ocp.PyTreeCheckpointHandler.async_save
    with _checkpointer(directory, on_event=lambda line: print("event:", line)) as checkpointer:
        checkpointer.save(1, state(1, "2x4"), {"at": 1})
        checkpointer.wait()
        if not distributed.is_leader():

            async def full(*args, **kwargs):
                raise OSError(28, "No space left on device")

            ocp.PyTreeCheckpointHandler.async_save = full
        checkpointer.save(2, state(2, "2x4"), {"at": 2})
        checkpointer.save(3, state(3, "2x4"), {"at": 3})
        ocp.PyTreeCheckpointHandler.async_save = original
        checkpointer.save(4, state(4, "2x4"), {"at": 4})
        checkpointer.wait()
    print("steps", sorted(path.name for path in Path(directory).iterdir()))


def differ_and_fail_alone(seeds: list[int]) -> None:
    """Every process has a seed of its own; then process 1 fails in a phase that all go through."""
    seed = seeds[distributed.process_index()]
    try:
        distributed.check_same(distributed.Channel("check"), {"seed": seed, "steps": 10})
        print("agreed")
    except ValueError as error:
        print(error)

    def phase() -> None:
        if distributed.process_index() == 1:
            raise ValueError("data.manual_dir='elsewhere': no such folder")

    distributed.Channel("phase").run_on_all(phase)


def train(workdir: str, *overrides: str) -> int:
    """The command line's `train` on the small run; returns its exit code."""
    from bilevel_flax import cli

    command = ["train", "--config", "tests/faults/small_run.py:soba", "--workdir", workdir]
    return cli.main([*command, *(f"--config.{override}" for override in overrides)])


def train_in_turn(workdir: str, *runs: list[str]) -> int:
    """One after the other, each with its overrides; the largest exit code if it is every one's."""
    codes = [train(workdir, *overrides) for overrides in runs]
    return max(codes) if len(set(codes)) == 1 else 70


def train_with_seeds(workdir: str, seeds: list[int]) -> int:
    """Every process was started with a seed of its own."""
    return train(workdir, f"seed={seeds[distributed.process_index()]}")


def train_with_examples(workdir: str, counts: list[int]) -> int:
    """Every process finds another number of examples where its data are."""
    from tests.faults import small_run

    original = small_run.examples
    count = counts[distributed.process_index()]
    small_run.examples = lambda asked: original(count if asked == 256 else asked)
    return train(workdir)


def join_alone() -> None:
    """The others never come."""
    os.environ["BILEVEL_FLAX_JOIN_SECONDS"] = "1"
    settings = {"coordinator": "127.0.0.1:9", "num_processes": 2, "process_id": 1}
    distributed.start(settings)
