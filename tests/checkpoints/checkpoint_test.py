"""A state comes back bit for bit, ready for the same jitted step, and saving never harms it."""

import asyncio
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct

from bilevel_flax.checkpoints.checkpointer import Checkpointer, CheckpointError, CheckpointMismatch


@struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    table: Any
    model_state: Any
    rng: Any


def make_state(seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {"dense": {"kernel": jax.random.normal(key, (4, 3)), "bias": jnp.zeros(3)}}
    opt_state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    table = (jnp.ones((5, 3), jnp.bfloat16), jnp.full(2, seed, jnp.int32))
    return State(jnp.int32(seed), params, opt_state, table, None, key)


def bits(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Everything that makes two trees the same to the last bit."""
    result = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = str(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        result.append((jax.tree_util.keystr(path), kind, array.shape, array.tobytes()))
    return result


def test_a_train_state_comes_back_bit_for_bit(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, make_state(3), {"lr": 0.1, "position": {"epoch": 2, "ids": [1, 2]}})
        restored = checkpointer.restore(make_state(0))
    assert restored is not None
    assert bits(restored.state) == bits(make_state(3))
    assert jax.tree.structure(restored.state) == jax.tree.structure(make_state(3))
    assert restored.meta == {"lr": 0.1, "position": {"epoch": 2, "ids": [1, 2]}}
    assert restored.step == 7


AWKWARD = {
    "negative zeros": lambda: jnp.full((3, 2), -0.0),
    "NaN payload": lambda: jax.lax.bitcast_convert_type(jnp.uint32([0x7FC12345]), jnp.float32),
    "scalar": lambda: jnp.float32(1 / 3),
    "no elements": lambda: jnp.zeros((0, 3)),
    "bool": lambda: jnp.array([True, False]),
    "uint8": lambda: jnp.arange(256, dtype=jnp.uint8),
    "float16": lambda: jnp.float16([1.5, -2]),
    "bfloat16": lambda: jnp.bfloat16([1.5, -2]),
    "float8": lambda: jnp.array([1.5, -2], jnp.float8_e4m3fn),
    "int4": lambda: jnp.array([-8, -1, 7], jnp.int4),
    "complex64": lambda: jnp.complex64([1 + 2j]),
    "key": lambda: jax.random.key(5),
    "keys of another kind": lambda: jax.random.split(jax.random.key(5, impl="rbg"), 3),
    "legacy key": lambda: jax.random.PRNGKey(5),
    "NumPy float64": lambda: np.linspace(0, 1, 5),
    "NumPy scalar": lambda: np.float32(0.1),
    "NumPy, Fortran order": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


@pytest.mark.parametrize("kind", AWKWARD)
def test_any_array_comes_back_bit_for_bit(kind: str, tmp_path: Path):
    # The second leaf: a state without any elements has nothing for Orbax to write.
    state = {"leaf": AWKWARD[kind](), "other": jnp.ones(2)}
    with Checkpointer(tmp_path, asynchronous=False) as checkpointer:
        checkpointer.save(1, state, {})
        restored = checkpointer.restore(state)
    assert restored is not None and bits(restored.state) == bits(state)


def test_keys_of_a_tree_cannot_collide(tmp_path: Path):
    state = {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2), "c/d": jnp.full(2, 2.0)}, "a%2Eb": None}
    state["a"]["c"] = {"d": jnp.full(2, 3.0)}
    state["a%2Eb"] = jnp.full(2, 4.0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        restored = checkpointer.restore(state)
    assert restored is not None and bits(restored.state) == bits(state)


def test_orbax_alone_reads_the_values(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {})
    tree = ocp.StandardCheckpointer().restore(tmp_path / "1" / "state")
    np.testing.assert_array_equal(
        tree["params"]["dense"]["kernel"], make_state().params["dense"]["kernel"]
    )


def test_orbaxs_manager_reads_the_directory(tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {"at": step})
    with ocp.CheckpointManager(tmp_path, item_names=("state", "meta")) as manager:
        assert manager.latest_step() == 2
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        restored = manager.restore(2, args=items)
    assert restored.meta == {"at": 2}
    np.testing.assert_array_equal(
        restored.state["params"]["dense"]["kernel"], make_state(2).params["dense"]["kernel"]
    )


def test_an_empty_directory_gives_none(tmp_path: Path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.restore(make_state()) is None
        assert checkpointer.read_meta() is None
        assert checkpointer.latest_step() is None


def test_the_newest_are_kept_and_any_of_them_can_be_chosen(tmp_path: Path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, make_state(step), {"seen": step})
            assert checkpointer.latest_step() == step
        restored = checkpointer.restore(make_state(), step=20)
        assert restored is not None and bits(restored.state) == bits(make_state(20))
        assert checkpointer.read_meta() == (30, {"seen": 30})
        with pytest.raises(CheckpointError, match=r"step=10: .*has the steps \[20, 30\]"):
            checkpointer.restore(make_state(), step=10)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_step_at_or_below_the_latest_is_refused(asynchronous: bool, tmp_path: Path):
    with Checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer:
        checkpointer.save(5, make_state(), {})
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step={step}: .*checkpoint of step 5 already"):
                checkpointer.save(step, make_state(), {})


def test_the_state_may_be_donated_at_once_and_is_really_donated(tmp_path: Path):
    @jax.jit(donate_argnums=0)
    def step(state: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf + 1, state)

    state = {"w": jnp.arange(50_000.0)}
    with Checkpointer(tmp_path) as checkpointer:
        for count in range(1, 4):
            checkpointer.save(count, state, {})
            before = state["w"].unsafe_buffer_pointer()
            state = step(state)
            assert state["w"].unsafe_buffer_pointer() == before
        restored = checkpointer.restore(state)
        assert restored is not None
        np.testing.assert_array_equal(restored.state["w"], np.arange(50_000.0) + 2)
        before = restored.state["w"].unsafe_buffer_pointer()
        assert step(restored.state)["w"].unsafe_buffer_pointer() == before


def _uncommitted() -> dict[str, Any]:
    return {"w": jnp.ones(8), "key": jax.random.key(0), "count": jnp.int32(0)}


def _on_a_mesh() -> dict[str, Any]:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(_uncommitted(), sharding)


@pytest.mark.parametrize("make", [_uncommitted, _on_a_mesh])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_restored_state_does_not_retrace_the_step(
    make: Callable[[], dict[str, Any]], abstract: bool, tmp_path: Path
):
    traces = 0

    @jax.jit
    def step(state: dict[str, Any]) -> dict[str, Any]:
        nonlocal traces
        traces += 1
        return {**state, "w": state["w"] * 2, "count": state["count"] + 1}

    fresh = step(make())
    template = jax.eval_shape(_uncommitted) if abstract and make is _uncommitted else make()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, fresh, {})
        restored = checkpointer.restore(template)
    assert restored is not None
    for leaf, original in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(make()), strict=True
    ):
        assert leaf.committed == original.committed
        assert leaf.sharding == original.sharding
        assert not leaf.aval.weak_type
    step(step(restored.state))
    assert traces == 1


def test_weak_types_do_not_survive(tmp_path: Path):
    weak = {"w": jnp.asarray(1.0) * 2}
    assert weak["w"].aval.weak_type
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, weak, {})
        restored = checkpointer.restore(weak)
    assert restored is not None and not restored.state["w"].aval.weak_type


def test_float64_is_not_rounded_away_without_x64(x64: None, tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2)}, {})
        template = jax.eval_shape(lambda: {"w": jnp.ones(2)})
        jax.config.update("jax_enable_x64", False)
        with pytest.raises(ValueError, match="float64 became float32; set jax_enable_x64"):
            checkpointer.restore(template)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"w": jnp.ones((2, 3))},
            r"leaf 'net.w': the model expects float32\[2, 3\], the checkpoint has float32\[3, 2\]",
        ),
        (
            {"w": jnp.ones((3, 2), jnp.bfloat16)},
            r"leaf 'net.w': the model expects bfloat16\[3, 2\], the checkpoint has float32\[3, 2\]",
        ),
        (
            {"extra": jnp.ones(1)},
            r"leaf 'net.extra': the model expects float32\[1\], the checkpoint has no such leaf",
        ),
        ({"b": None}, r"leaf 'net.b': the checkpoint has float32\[2\], the model has no such leaf"),
        (
            {"key": jax.random.key_data(jax.random.key(0))},
            r"expects uint32\[2\], the checkpoint has threefry2x32 key, uint32\[2\]",
        ),
    ],
)
def test_another_models_checkpoint_is_refused(change: dict, message: str, tmp_path: Path):
    net = {"b": jnp.zeros(2), "key": jax.random.key(0), "w": jnp.ones((3, 2))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"net": net}, {})
        with pytest.raises(CheckpointMismatch, match=message):
            checkpointer.restore({"net": net | change})
        assert checkpointer.restore({"net": net}) is not None


@pytest.mark.parametrize("leaf", [3, 0.5, True, "text", b"bytes", np.array(["a"]), lambda x: x])
def test_a_leaf_that_is_no_array_is_named(leaf: Any, tmp_path: Path):
    with Checkpointer(tmp_path) as checkpointer:
        for refuse in (checkpointer.restore, lambda s: checkpointer.save(1, s, {})):
            with pytest.raises(TypeError, match=r"leaf 'net.bad' has (type|dtype) .*jnp.asarray"):
                refuse({"net": {"bad": leaf}})
        assert checkpointer.latest_step() is None


def test_donated_leaves_and_metadata_that_are_not_json_are_refused(tmp_path: Path):
    dead = jnp.ones(3)
    dead.delete()
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="leaf 'w' has been donated"):
            checkpointer.save(1, {"w": dead}, {})
        with pytest.raises(TypeError, match="meta: .*not JSON serializable"):
            checkpointer.save(1, make_state(), {"x": np.float32(1)})


def test_metadata_are_copied_when_saved(tmp_path: Path):
    meta = {"position": [1, 2]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), meta)
        meta["position"].append(3)
        assert checkpointer.read_meta() == (1, {"position": [1, 2]})


def test_read_only_changes_nothing(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path / "absent", read_only=True)
    assert checkpointer.restore(make_state()) is None
    assert not (tmp_path / "absent").exists()
    with pytest.raises(CheckpointError, match="read_only=True"):
        checkpointer.save(1, make_state(), {})


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written there") as caught:
        Checkpointer(tmp_path / "file" / "checkpoints")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


def test_saving_blocks_only_for_the_copy(tmp_path: Path):
    state = {"w": jnp.ones((784, 10)), "weights": jnp.zeros(20_000)}
    blocked = []
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 6):
            start = time.perf_counter()
            checkpointer.save(step, state, {})
            blocked.append(time.perf_counter() - start)
            checkpointer.wait()
    # About 1 ms; the writing itself takes 50, and a busy machine must not fail the test.
    assert min(blocked) < 0.02


_PLAIN = """
    import logging, pickle, sys
    logging.basicConfig(level=logging.INFO)
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")
    import jax, jax.numpy as jnp
    from bilevel_flax.checkpoints.checkpointer import Checkpointer
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        setattr(pickle, name, refuse)
    state = {"w": jnp.ones(5), "key": jax.random.key(0)}
    with Checkpointer(sys.argv[1], on_event=lambda line: None) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state, {})
        assert checkpointer.restore(state).step == 3
        open(sys.argv[1] + "/3/state/manifest.ocdbt", "w").close()
        assert checkpointer.restore(state).step == 2
    print("done")
"""


def test_no_pickle_and_no_chatter_even_under_a_verbose_root_logger(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PLAIN), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "absl" in line or "rbax" in line]
    assert (done.stdout, lines) == ("done\n", [])
    for path in tmp_path.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle")


def test_someone_who_asks_absl_for_more_gets_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="absl"), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {})
    assert any("Pytree save finalize" in record.getMessage() for record in caplog.records)


def test_inside_a_running_event_loop_nothing_is_patched(tmp_path: Path):
    async def notebook() -> bool:
        loop = asyncio.get_running_loop()
        with Checkpointer(tmp_path, asynchronous=False) as checkpointer:
            checkpointer.save(1, make_state(1), {})
            restored = checkpointer.restore(make_state(0))
        return loop is asyncio.get_running_loop() and bits(restored.state) == bits(make_state(1))

    assert asyncio.run(notebook())
    assert not hasattr(asyncio, "_nest_patched")  # nest_asyncio's mark
