"""Whatever happens to the disk or the process: a restored state is one that was saved, or an error.

Damaged files, failing writes, kill -9 in the middle of a save.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import savers

from bilevel_flax.checkpoints.checkpointer import Checkpointer, CheckpointError


def make_state(step: int) -> dict:
    random_values = jax.random.normal(jax.random.key(step), (300,))
    return {"net": {"w": random_values, "b": jnp.zeros(3)}, "step": jnp.int32(step)}


def same(state: dict, step: int) -> bool:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), {"at": step})
    return directory


def flip(path: Path, position: int | None = None, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_any_file_gives_a_wrong_state(damage: str, three_steps: Path, tmp_path: Path):
    files = [path.relative_to(three_steps) for path in (three_steps / "3").rglob("*")]
    files = [file for file in files if (three_steps / file).is_file()]
    fell_back = []
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(three_steps, directory)
        DAMAGES[damage](directory / file)
        events: list[str] = []
        with Checkpointer(directory, on_event=events.append) as checkpointer:
            restored = checkpointer.restore(make_state(0))
            assert restored is not None and same(restored.state, restored.step), file
            assert restored.meta == {"at": restored.step}, file
            if restored.step != 3:
                fell_back.append(file.name)
                assert restored.step == 2
                assert len(events) == 1 and "step 3 is damaged" in events[0], events
                assert "\n" not in events[0] and (directory / "damaged" / "3").is_dir()
                checkpointer.save(3, make_state(3), {"at": 3})
                checkpointer.wait()
                again = checkpointer.restore(make_state(0))
                assert again is not None and again.step == 3 and same(again.state, 3)
            else:
                assert events == []
    # Everything that holds values or says where they are; the rest is Orbax's own bookkeeping.
    assert {"metadata", "manifest.ocdbt"} <= set(fell_back)
    assert sum(len(name) == 32 for name in fell_back) >= 2  # tensorstore's data files


def test_random_flips_are_found_or_harmless(three_steps: Path, tmp_path: Path):
    files = [path for path in (three_steps / "3").rglob("*") if path.is_file()]
    rng = random.Random(0)
    for number in range(40):
        directory = tmp_path / str(number)
        shutil.copytree(three_steps, directory)
        file = directory / rng.choice(files).relative_to(three_steps)
        flip(file, rng.randrange(file.stat().st_size), rng.randrange(8))
        with Checkpointer(directory, on_event=lambda line: None) as checkpointer:
            restored = checkpointer.restore(make_state(0))
        assert restored is not None and same(restored.state, restored.step), file


def test_an_altered_value_that_orbax_reads_without_a_word_is_found(tmp_path: Path):
    # So long that its file is told by the size alone, so random that compression stores it as it
    # is: nobody but the leaf's own checksum sees the bit.
    state = {"w": np.frombuffer(np.random.default_rng(0).bytes(3 << 20), np.uint8), "b": np.ones(2)}
    events: list[str] = []
    with Checkpointer(tmp_path, on_event=events.append) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state)
        checkpointer.wait()
        files = [path for path in (tmp_path / "2" / "state").rglob("*") if path.is_file()]
        flip(max(files, key=lambda path: path.stat().st_size))
        altered = ocp.StandardCheckpointer().restore(tmp_path / "2" / "state")
        assert (altered["w"] != state["w"]).sum() == 1
        restored = checkpointer.restore(state)
    assert restored is not None and restored.step == 1
    assert len(events) == 1 and "leaf 'w' has changed on disk" in events[0]


def test_altered_metadata_are_found(three_steps: Path, tmp_path: Path):
    directory = tmp_path / "altered"
    shutil.copytree(three_steps, directory)
    file = directory / "3" / "meta" / "metadata"
    document = json.loads(file.read_text())
    document["at"] = 30
    file.write_text(json.dumps(document))
    events: list[str] = []
    with Checkpointer(directory, on_event=events.append, read_only=True) as checkpointer:
        assert checkpointer.read_meta() == (2, {"at": 2})
        assert "step 3 is damaged: its metadata have changed" in events[0]
        restored = checkpointer.restore(make_state(0))
        assert restored is not None and restored.step == 2
    assert (directory / "3").exists() and not (directory / "damaged").exists()


def test_a_step_asked_for_by_number_does_not_fall_back(three_steps: Path, tmp_path: Path):
    directory = tmp_path / "copy"
    shutil.copytree(three_steps, directory)
    (directory / "2" / "state" / "manifest.ocdbt").unlink()
    with Checkpointer(directory) as checkpointer:
        with pytest.raises(CheckpointError, match="sound .step 2: the file state/.*is missing"):
            checkpointer.restore(make_state(0), step=2)
        restored = checkpointer.restore(make_state(0), step=1)
        assert restored is not None and same(restored.state, 1)


def test_all_damaged_is_an_error_every_time(three_steps: Path, tmp_path: Path):
    directory = tmp_path / "copy"
    shutil.copytree(three_steps, directory)
    for step in (1, 2, 3):
        (directory / str(step) / "meta" / "metadata").write_text("")
    for _ in range(2):
        with (
            Checkpointer(directory) as checkpointer,
            pytest.raises(CheckpointError, match="step 3: .*step 2: .*step 1: .*from scratch"),
        ):
            checkpointer.restore(make_state(0))


def test_saving_goes_on_beside_the_remains_of_killed_runs(three_steps: Path, tmp_path: Path):
    directory = tmp_path / "copy"
    shutil.copytree(three_steps, directory)
    shutil.rmtree(directory / "1" / "state")  # Killed while the oldest was being deleted.
    shutil.copytree(directory / "3", directory / "4.orbax-checkpoint-tmp")  # Killed while saving.
    with Checkpointer(directory) as checkpointer:
        assert checkpointer.latest_step() == 3
        checkpointer.save(4, make_state(4), {"at": 4})
        checkpointer.wait()
        restored = checkpointer.restore(make_state(0))
        assert restored is not None and restored.step == 4 and same(restored.state, 4)
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3", "4"]


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel refuses longer files: as near to a full disk as an ordinary user gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_takes_no_more_loses_nothing(asynchronous: bool, tmp_path: Path):
    events: list[str] = []
    checkpointer = Checkpointer(tmp_path, asynchronous=asynchronous, on_event=events.append)
    checkpointer.save(1, make_state(1), {})
    checkpointer.wait()
    with files_limited_to(200), pytest.raises(CheckpointError, match="step 2 was not saved"):
        checkpointer.save(2, make_state(2), {})
        checkpointer.wait()
    assert len(events) == 1 and "a file would exceed the size limit" in events[0]
    assert "\n" not in events[0]
    # A write of Orbax's that is still under way may leave files behind: the next save clears them.
    assert [path.name for path in tmp_path.iterdir() if path.name.isdecimal()] == ["1"]
    restored = checkpointer.restore(make_state(0))
    assert restored is not None and restored.step == 1 and same(restored.state, 1)
    checkpointer.save(2, make_state(2), {})  # There is room again.
    checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    restored = checkpointer.restore(make_state(0))
    assert restored is not None and restored.step == 2 and same(restored.state, 2)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    async def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device", "some/file")

    return lambda: monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", refuse)


def test_a_disk_that_fills_up_later_is_reported_once_and_training_goes_on(
    tmp_path: Path, full_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    with Checkpointer(tmp_path, on_event=events.append) as saver:
        saver.save(1, make_state(1), {})
        full_disk()
        for step in (2, 3, 4):
            saver.save(step, make_state(step), {})  # Not raised here: the next save tries anew.
        with pytest.raises(CheckpointError, match="step 4 was not saved"):
            saver.wait()
        monkeypatch.undo()
        saver.save(5, make_state(5), {})
        saver.wait()
        full_disk()
        saver.save(6, make_state(6), {})
        with pytest.raises(CheckpointError, match="step 6 was not saved"):
            saver.wait()
    assert [event.partition(":")[0].partition(",")[0] for event in events] == [
        "The checkpoint of step 2 was not saved",
        "The checkpoint of step 5 was saved",
        "The checkpoint of step 6 was not saved",
    ]
    assert "no space left on the disk" in events[0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_first_save_that_fails_is_an_error_at_once(
    asynchronous: bool, tmp_path: Path, full_disk: Callable[[], None]
):
    full_disk()
    events: list[str] = []
    with (
        Checkpointer(tmp_path, asynchronous=asynchronous, on_event=events.append) as saver,
        pytest.raises(CheckpointError, match="step 1 was not saved: no space left on the disk"),
    ):
        saver.save(1, make_state(1), {})
    assert events == []  # The error is the report.


def test_checkpoints_that_are_not_required_never_stop_a_run(
    tmp_path: Path, full_disk: Callable[[], None]
):
    full_disk()
    events: list[str] = []
    saver = Checkpointer(tmp_path, required=False, on_event=events.append)
    for step in (1, 2, 3):
        saver.save(step, make_state(step), {})
    with pytest.raises(CheckpointError):
        saver.wait()
    assert len(events) == 1 and "step 1 was not saved" in events[0]


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(
    tmp_path: Path, full_disk: Callable[[], None]
):
    events: list[str] = []
    with (
        pytest.raises(ZeroDivisionError),
        Checkpointer(tmp_path, on_event=events.append) as checkpointer,
    ):
        checkpointer.save(1, make_state(1), {})
        full_disk()
        checkpointer.save(2, make_state(2), {})
        raise ZeroDivisionError
    assert len(events) == 1


def test_kill_9_while_saving_leaves_a_saved_state(tmp_path: Path):
    directory, rng, reached, cut_short = tmp_path / "checkpoints", random.Random(0), 0, 0
    events: list[str] = []
    with subprocess.Popen(
        [sys.executable, savers.__file__, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as program:
        for _ in range(10):
            assert program.stdin is not None and program.stdout is not None
            print(reached, rng.random() * 0.15, file=program.stdin, flush=True)
            assert program.stdout.readline() == "killed\n"
            cut_short += len(list(directory.glob("*.orbax-checkpoint-tmp")))
            with Checkpointer(directory, on_event=events.append, read_only=True) as checkpointer:
                restored = checkpointer.restore(savers.make_state(0))
            assert restored is not None and restored.step > reached
            assert restored.meta == {"at": restored.step}
            for name, leaf in savers.make_state(restored.step).items():
                assert restored.state[name].tobytes() == leaf.tobytes()
            reached = restored.step
        program.stdin.close()
    assert cut_short > 0  # Else no kill fell into a save, and nothing was tested.
    assert events == []  # A kill damages nothing that was complete.
