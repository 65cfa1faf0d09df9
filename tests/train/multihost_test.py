"""Two processes with four devices each, on this machine, for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from bilevel_flax.checkpoints import format as checkpoint_format
from bilevel_flax.train import multihost as distributed

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Groups:
    """Runs jobs in groups of processes; see `process_groups.py`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, HERE / "process_groups.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(
                    map(str, (ROOT, ROOT / "tests", HERE, ROOT / "tests" / "sharding"))
                ),
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )

    def __call__(
        self,
        job: str,
        *arguments: object,
        count: int = 2,
        devices: int = 4,
        sent: tuple[int, str, Path] | None = None,
    ) -> tuple[list[int], list[str]]:
        """Exit codes and outputs, by process."""
        self._count += 1
        log = self.folder / f"log{self._count}"
        order = {
            "job": f"multihost_jobs:{job}",
            "arguments": [str(a) if isinstance(a, Path) else a for a in arguments],
            "count": count,
            "devices": devices,
            "log": str(log),
            "signal": sent and [*sent[:2], str(sent[2])],
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return codes, [Path(f"{log}.{process}").read_text() for process in range(count)]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    made = Groups(tmp_path_factory.mktemp("groups"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def saved(groups: Groups) -> Path:
    """Checkpoints of steps 2 and 3, saved by 2 processes on a 2x4 mesh."""
    folder = groups.folder / "saved"
    codes, outputs = groups("save", folder, "2x4", 3)
    assert codes == [0, 0], outputs
    # Both processes read them again too, on 2x4 and on 4x2.
    assert outputs == ["saved ['2', '3']\n"] * 2
    return folder


def test_every_process_has_written_its_shards(saved: Path):
    for process in (0, 1):
        files = list((saved / "3" / "state" / f"ocdbt.process_{process}" / "d").iterdir())
        assert files
        assert sum(file.stat().st_size for file in files) > 10_000


@pytest.mark.parametrize(
    ("mesh", "count", "devices"),
    [("4x2", 1, 8), (None, 1, 1)],
    ids=["1 process 4x2", "1 device"],
)
def test_it_comes_back_bit_for_bit_elsewhere(
    mesh: str | None, count: int, devices: int, groups: Groups, saved: Path
):
    codes, outputs = groups("restore", mesh, saved, count=count, devices=devices)
    assert codes == [0] * count, outputs
    assert outputs == ["restored 3 from saved\n"] * count


def test_many_processes_read_what_one_has_saved(groups: Groups):
    folder = groups.folder / "by one"
    codes, outputs = groups("save", folder, "4x2", 1, count=1, devices=8)
    assert codes == [0], outputs
    codes, outputs = groups("restore", "2x4", folder)
    assert (codes, outputs) == ([0, 0], ["restored 1 from by one\n"] * 2)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": lambda step: flip(largest(step / "state" / "ocdbt.process_1")),
    "truncated": lambda step: os.truncate(largest(step / "state" / "ocdbt.process_1"), 100),
    "shard deleted": lambda step: largest(step / "state" / "ocdbt.process_1").unlink(),
    "process deleted": lambda step: shutil.rmtree(step / "state" / "ocdbt.process_1"),
    "metadata emptied": lambda step: os.truncate(step / "meta" / "metadata", 0),
    "tree emptied": lambda step: os.truncate(step / "state" / "_METADATA", 0),
}


def test_damage_is_found_by_all_and_the_previous_step_restored(groups: Groups, saved: Path):
    folders = []
    for name, damage in DAMAGES.items():
        folders.append(groups.folder / name)
        shutil.copytree(saved, folders[-1])
        damage(folders[-1] / "3")
    codes, outputs = groups("restore", "2x4", *folders)
    assert codes == [0, 0], outputs
    for output in outputs:
        # Orbax's own threads may print after a read that failed (`Exception ignored in ...`).
        ours = ("event: ", "restored ")
        lines = [line for line in output.splitlines() if line.startswith(ours)]
        assert len(lines) == 2 * len(folders), output
        for folder, said, restored in zip(folders, lines[::2], lines[1::2], strict=True):
            assert said.startswith("event: The checkpoint of step 3 is damaged: "), said
            assert "moved to" in said
            assert restored == f"restored 2 from {folder.name}"


def test_another_model_is_one_line_on_every_process(groups: Groups, saved: Path):
    codes, outputs = groups("restore_another_model", saved, "2x4")
    assert codes == [1, 1]
    for output in outputs:
        assert output.count("\n") == 1
        assert (
            "leaf 'v': the model expects float32[16, 32], the checkpoint has float32[16" in output
        )
    assert (saved / "3").is_dir()


def test_a_disk_that_is_full_for_one_process_loses_nothing(groups: Groups):
    codes, outputs = groups("fail_on_one", groups.folder / "full")
    assert codes == [0, 0], outputs
    for output in outputs:
        event, again, steps = output.splitlines()
        assert "The checkpoint of step 3 was saved" in again
        assert "The checkpoint of step 2 was not saved: " in event
        assert "no space left on the disk" in event
        assert steps == "steps ['1', '3', '4']"


def test_processes_that_differ_or_fail_alone_all_exit_with_one_line(groups: Groups):
    codes, outputs = groups("differ_and_fail_alone", [1, 2])
    assert codes == [1, 1]
    for output in outputs:
        differ, alone = output.splitlines()
        assert "seed: 1 on process 0, 2 on process 1" in differ
        assert "data.manual_dir='elsewhere': no such folder" in alone


def test_processes_that_do_not_meet_end_with_one_line(groups: Groups):
    codes, outputs = groups("join_alone", count=1)
    assert codes == [2]
    assert outputs[0].count("\n") == 1
    assert "the 2 processes did not all meet at 127.0.0.1:9 within 1 s" in outputs[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hosts": 2}, "distributed.hosts: unknown; there are coordinator, num_processes"),
        ("always", "distributed='always': must be \"auto\", a dict, or None"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 2}, "could not be joined"),
    ],
)
def test_settings_that_join_nobody_are_refused(settings: object, message: str):
    with pytest.raises(ValueError, match=message):
        distributed.start(settings)


def arrays_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    path = epath.Path(workdir / "checkpoints" / str(step))
    document = checkpoint_format.read_document(path, step)
    found = checkpoint_format.read_arrays(path, document)
    return {name: np.asarray(array) for name, array in found.items()}


MESH = ("mesh=data=8", "reduction=shard_map")  # without the check that finds out
SHORT = ("steps=10", "log_every=5", "eval_every=5", "checkpoint.every=5", *MESH)


def test_ten_steps_are_those_of_one_process(groups: Groups):
    """Ten steps of the whole command, with evaluations and checkpoints."""
    together, alone = groups.folder / "together", groups.folder / "alone"
    codes, outputs = groups("train", together, *SHORT)
    assert codes == [0, 0], outputs
    assert "report: " in outputs[0]
    assert outputs[1].replace("[Gloo]", "").count("report") == 0  # process 0 alone speaks
    codes, outputs = groups("train", alone, *SHORT, count=1, devices=8)
    assert codes == [0], outputs
    ours, theirs = arrays_of(together, 10), arrays_of(alone, 10)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 15
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-6, err_msg=name)
    lines = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    assert json.loads((together / "summary.json").read_text())["steps"] == 10


def test_a_signal_to_one_process_saves_on_all_and_any_number_goes_on(groups: Groups):
    workdir = groups.folder / "preempted"
    long = ("steps=100000", "log_every=1000", "checkpoint.every=10", *MESH)
    codes, outputs = groups("train", workdir, *long, sent=(1, "SIGTERM", workdir / "checkpoints"))
    assert codes == [143, 143], outputs
    for output in outputs:
        assert output.strip().splitlines()[-1].startswith("SIGTERM: saved at step ")
    saved = int(outputs[0].split("saved at step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(saved)).is_dir()
    # Another mesh, one process, another log interval: none of it makes it another run.
    others = ["steps=99999"], ["steps=100000", "seed=1"]
    codes, outputs = groups("train_in_turn", workdir, *others, count=1, devices=2)
    assert codes == [2]
    steps, seed = outputs[0].splitlines()
    assert "steps: saved 100000, now 99999" in steps
    assert "mesh" not in steps.split("another config")[1]
    assert "seed: saved 0, now 1)" in seed


def test_processes_with_different_configs_all_exit(groups: Groups):
    workdir = groups.folder / "different"
    codes, outputs = groups("train_with_seeds", workdir, [0, 1])
    assert codes == [2, 2]
    for output in outputs:
        assert "the processes differ (seed: 0 on process 0, 1 on process 1)" in output
    codes, outputs = groups("train_with_examples", workdir, [256, 240])
    assert codes == [2, 2]
    for output in outputs:
        assert "inner examples: 256 on process 0, 240 on process 1" in output
