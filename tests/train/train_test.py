"""A run end to end on real digits: what it leaves behind, and that nothing can interrupt it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel_flax.checkpoints import format as checkpoint_format
from bilevel_flax.train import config
from bilevel_flax.train import experiment as train
from bilevel_flax.train import workdir as workdirs
from bilevel_flax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "mnist_hypercleaning.py")
STEPS = 600
OFTEN = (f"steps={STEPS}", "log_every=50", "eval_every=100", "checkpoint.every=50")
SMALL = ("data.splits=600,200,200", *OFTEN)
# What issue and design promise of summary.json.
SUMMARY = {
    "test_error",
    "test_error_retrained",
    "test_error_handover",
    "corrected_label_accuracy",
    "plain_step_equivalents",
    "test_error_refit",
    "test_error_no_weights",
    "test_error_validation_only",
    "test_error_clean",
    "wrong_label_auc",
    "steps",
    "seconds",
    "seconds_per_step",
    "oracle_units",
    "adjoint_residual",
    "gradient_units_per_step",
    "hypergradient_cosine",
    "solver",
    "seed",
    "versions",
}


def load(*overrides: str, solver: str = "soba") -> Any:
    return config.load(f"{CONFIG}:{solver}", [*SMALL, *overrides])


def final(workdir: Path) -> dict[str, bytes]:
    """All that must not depend on interruptions: metrics and the last state, bit for bit."""
    path = workdir / "checkpoints" / str(STEPS)
    document = checkpoint_format.read_document(path, STEPS)
    arrays = checkpoint_format.read_arrays(path, document)
    found = {name: array.tobytes() for name, array in arrays.items()}
    assert len(found) >= 9
    return found | {"metrics.jsonl": (workdir / "metrics.jsonl").read_bytes()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run, with baselines."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train.train_and_evaluate(load(), workdir)


def test_the_summary_holds_what_was_promised(finished: tuple[Path, dict[str, Any]]):
    workdir, summary = finished
    assert set(summary) >= SUMMARY
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["steps"] == STEPS
    assert summary["oracle_units"] == 4 * STEPS
    assert summary["gradient_units_per_step"] == 4.0
    assert summary["hypergradient_cosine"] > 0.9
    assert summary["hypergradient_reference_residual"] < 0.01
    assert summary["solver"] == "soba"
    assert summary["seed"] == 0
    assert summary["versions"]["jax"]
    assert summary["seconds_per_step"] == pytest.approx(summary["seconds"] / STEPS)
    assert 0 < summary["adjoint_residual"] < 1
    errors = [value for name, value in summary.items() if name.startswith("test_error")]
    assert len(errors) == 7
    assert all(0 <= error <= 1 for error in errors)


def test_the_files_are_there(finished: tuple[Path, dict[str, Any]]):
    workdir, _ = finished
    names = {path.name for path in workdir.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "tensorboard",
        "checkpoints",
        "network.npz",
        "learned.npz",
        "suspicious.csv",
    }
    assert not [name for name in names if "partial" in name]
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(50, STEPS + 1, 50))
    assert set(lines[0]) >= {"inner_loss", "outer_loss", "norm_inner", "oracle_units"}
    assert set(lines[1]) >= {"validation_error", "wrong_label_auc"}
    probed = [line["step"] for line in lines if "health/outer_size" in line]
    assert probed == [300, 600]  # two cost 3 % of the run
    assert "hypergradient_cosine" in lines[-1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    rows = (workdir / "suspicious.csv").read_text().splitlines()
    assert rows[0].startswith("index,given_label,weight,rank")
    assert len(rows) == 1 + 600


def test_it_learns(finished: tuple[Path, dict[str, Any]]):
    workdir, summary = finished
    assert summary["wrong_label_auc"] > 0.8
    assert summary["test_error_clean"] < summary["test_error_no_weights"] < 0.7
    assert summary["test_error"] < 0.5
    lines = read_metrics(workdir / "metrics.jsonl")
    assert lines[-1]["outer_loss"] < 0.8 * lines[0]["outer_loss"]


def test_a_finished_run_returns_at_once(
    finished: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    workdir, summary = finished
    monkeypatch.setattr(config, "resolve", lambda *_, **__: pytest.fail("it did not return"))
    assert train.train_and_evaluate(load(), workdir) == summary
    assert "is a finished run" in capsys.readouterr().out


def test_another_config_is_refused_by_the_differing_keys(finished: tuple[Path, dict[str, Any]]):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(config.ConfigError) as caught:
        train.train_and_evaluate(load("seed=1", "solver.inner.momentum=0.9"), workdir)
    message = str(caught.value)
    assert "seed: saved 0, now 1" in message
    assert "solver.inner.momentum: saved nothing, now 0.9" in message
    assert "steps" not in message
    assert (workdir / "config.json").read_bytes() == before


def test_settings_without_influence_on_the_numbers_may_differ(
    finished: tuple[Path, dict[str, Any]],
):
    workdir, summary = finished
    harmless = ("log_every=10", "checkpoint.keep=1", "on_device=false", "data.data_dir=elsewhere")
    assert train.train_and_evaluate(load(*harmless), workdir) == summary


def unfinished(workdir: Path, target: Path) -> Path:
    """The run as it was before its last act: checkpoints are there, the summary is not."""
    shutil.copytree(workdir, target)
    (target / "summary.json").unlink()
    return target


def flip_a_byte(step_folder: Path) -> None:
    largest = max(
        (p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = unfinished(finished[0], tmp_path / "damaged")
    flip_a_byte(workdir / "checkpoints" / str(STEPS))
    summary = train.train_and_evaluate(load(), workdir)
    said = capsys.readouterr().err
    assert f"The checkpoint of step {STEPS} is damaged" in said
    assert f"resuming {workdir} at step {STEPS - 50}" in said
    assert final(workdir) == final(finished[0])
    same = SUMMARY - {"seconds", "seconds_per_step"}
    assert {k: summary[k] for k in same} == {k: finished[1][k] for k in same}


def test_baselines_that_are_done_are_not_done_again(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = unfinished(finished[0], tmp_path / "late")
    kept = json.loads((workdir / "baselines.json").read_text())
    del kept["test_error_retrained"]
    workdirs.write_json(workdir / "baselines.json", kept)
    summary = train.train_and_evaluate(load(), workdir)
    said = capsys.readouterr()
    assert "baseline 4/5: retrained" in said.out
    assert "baseline 1/5" not in said.out
    assert "compiling" not in said.err
    assert summary["test_error_retrained"] == finished[1]["test_error_retrained"]


def test_an_early_end_leaves_the_folder_free_for_another_config(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
):
    workdir = unfinished(finished[0], tmp_path / "early")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "best.npz").unlink(missing_ok=True)
    workdirs.check_same_run(workdir, config.plain(load("seed=1")))


def test_a_network_without_wrong_labels_runs_and_has_no_auc(tmp_path: Path):
    overrides = ("model=cnn", "weights=softmax", "on_device=false", "corruption=0")
    tiny = ("data.splits=90,50,30", "steps=6", "log_every=3", "eval_every=3", "batch_size=32")
    tiny += ("health.every=0", "health.summary=false")  # they have tests of their own
    summary = train.train_and_evaluate(load(*tiny, "baselines=false", *overrides), tmp_path / "run")
    assert summary["oracle_units"] == 4 * 6
    assert 0 <= summary["test_error"] <= 1
    learned = np.load(tmp_path / "run" / "learned.npz", allow_pickle=False)
    assert learned["weights"].shape == (90,)
    assert np.isfinite(learned["weights"]).all()
    # Strict JSON has no NaN.
    text = (tmp_path / "run" / "summary.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in summary.json"))
    assert math.isnan(summary["wrong_label_auc"])
    assert strict["wrong_label_auc"] is None


class Runner:
    """Trains in forked processes that can be killed; see `killed_runs.py`."""

    def __init__(self, folder: Path):
        self.folder = folder
        overrides = [f"--config.{override}" for override in OFTEN]
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "killed_runs.py", *overrides],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                # The second process and those after it need not compile.
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )

    def __call__(self, name: str, sent: str = "-", step: int = 0, delay: float = 0.0) -> int:
        """Trains in folder `name`, until a signal or to the end; returns the exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self.folder / name} {sent} {step} {delay}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    # The reference is made by the same program: threads and devices are those of the killed runs.
    made = Runner(tmp_path_factory.mktemp("killed"))
    assert made("whole") == 0, made.log("whole")
    yield made
    made.close()


def test_interruptions_of_every_kind_leave_no_trace_in_the_results(runner: Runner):
    assert runner("broken", "SIGKILL", step=50, delay=0.02) == -9
    assert runner("broken", "SIGTERM", step=150, delay=0.01) == 143
    said = runner.log("broken").strip().splitlines()[-1]
    assert said.startswith("SIGTERM: saved at step ")
    saved = int(said.split()[4].rstrip(";"))
    assert (runner.folder / "broken" / "checkpoints" / str(saved)).is_dir()
    assert runner("broken", "SIGINT", step=250, delay=0.01) == 130
    log = runner.log("broken")
    assert f"resuming {runner.folder / 'broken'} at step {saved}" in log
    assert log.strip().splitlines()[-1].startswith("SIGINT: saved at step ")
    assert runner("broken", "SIGKILL", step=350) == -9
    assert runner("broken") == 0
    log = runner.log("broken")
    assert log.count("resuming") == 4
    assert "Traceback" not in log
    assert "damaged" not in log
    assert final(runner.folder / "broken") == final(runner.folder / "whole")


@pytest.mark.slow
def test_kills_at_random_moments(runner: Runner):
    draw = random.Random(0)
    for number in range(12):
        name = f"random{number}"
        for _ in range(draw.randint(1, 4)):
            step = draw.choice([-1, -1, 0, 100, 300])
            # From the start on: into loading, compiling, training, the report, or past the end.
            runner(name, "SIGKILL", step=step, delay=draw.uniform(0, 6 if step < 0 else 0.05))
        assert runner(name) == 0, runner.log(name)
        assert final(runner.folder / name) == final(runner.folder / "whole")
