"""The best network so far: whole on the disk or not there, and never a reason not to resume."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_flax.checkpoints import BestCheckpoint, CheckpointMismatch

TREE = ({"w": jnp.arange(3.0), "half": jnp.bfloat16([1.5, -2])}, {"key": jax.random.key(3)})
ZEROS = ({"w": jnp.zeros(3), "half": jnp.zeros(2, jnp.bfloat16)}, {"key": jax.random.key(0)})


def test_the_lowest_value_is_kept_bit_for_bit(tmp_path: Path):
    path = tmp_path / "best.npz"
    for step, value in enumerate([0.5, float("nan"), 0.25, 0.25]):
        # A resumed run opens the file anew, and is handed what it had been.
        BestCheckpoint(path).maybe_save(step, value, jax.tree.map(lambda a: a, TREE))
    BestCheckpoint(path).maybe_save(4, 0.3, ZEROS)
    step, (params, rest) = BestCheckpoint(path).restore(ZEROS)
    assert step == 2
    np.testing.assert_array_equal(params["w"], np.arange(3))
    assert params["half"].dtype == jnp.bfloat16 and params["half"].tolist() == [1.5, -2]
    assert jnp.array_equal(jax.random.key_data(rest["key"]), jnp.uint32([0, 3]))
    assert [file.name for file in tmp_path.iterdir()] == ["best.npz"]


def test_nothing_saved_gives_the_template(tmp_path: Path):
    assert BestCheckpoint(tmp_path / "best.npz").restore(ZEROS) == (0, ZEROS)


def test_another_models_network_is_named(tmp_path: Path):
    BestCheckpoint(tmp_path / "best.npz").maybe_save(1, 0.5, {"w": jnp.ones(3)})
    with pytest.raises(CheckpointMismatch, match="leaf 'w': the model expects float32.2., .*3"):
        BestCheckpoint(tmp_path / "best.npz").restore({"w": jnp.ones(2)})


DAMAGES = {
    "empty": lambda data: b"",
    "zeros, as after a power failure": lambda data: bytes(len(data)),
    "truncated": lambda data: data[: len(data) // 2],
    "flipped in the metadata": lambda data: _flip(data, data.index(b"value")),
    "text": lambda data: b"not an archive",
}


def _flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_said_in_one_line_and_moved_aside(damage: str, tmp_path: Path):
    path = tmp_path / "best.npz"
    BestCheckpoint(path).maybe_save(1, 0.5, TREE)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    events: list[str] = []
    best = BestCheckpoint(path, on_event=events.append)
    assert len(events) == 1 and "best network so far is lost" in events[0]
    assert "\n" not in events[0] and (tmp_path / "best.damaged.npz").exists()
    best.maybe_save(2, 0.7, TREE)  # No longer the lowest of all, but of those that are left.
    assert best.restore(ZEROS)[0] == 2


def test_a_flipped_bit_anywhere_never_gives_other_values(tmp_path: Path):
    path = tmp_path / "best.npz"
    BestCheckpoint(path).maybe_save(1, 0.5, TREE)
    sound = path.read_bytes()
    for position in range(0, len(sound), 7):
        path.write_bytes(_flip(sound, position))
        best = BestCheckpoint(path, on_event=lambda line: None)
        step, (params, _) = best.restore(ZEROS)
        if step:
            np.testing.assert_array_equal(params["w"], np.arange(3))
            assert params["half"].tolist() == [1.5, -2]


def test_the_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *p: (calls.append("replace"), replace(*p)))
    BestCheckpoint(tmp_path / "best.npz").maybe_save(1, 0.5, TREE)
    assert calls[:2] == ["fsync", "replace"]


def test_a_file_of_before_names_is_read(tmp_path: Path):
    leaves = {f"leaf{i}": np.array(leaf) for i, leaf in enumerate(jax.tree.leaves(TREE[0]))}
    np.savez(tmp_path / "best.npz", value=0.5, step=7, **leaves)
    step, params = BestCheckpoint(tmp_path / "best.npz").restore(ZEROS[0])
    assert step == 7
    np.testing.assert_array_equal(params["w"], np.arange(3))
    assert params["half"].tolist() == [1.5, -2]
