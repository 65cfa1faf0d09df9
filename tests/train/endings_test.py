"""How a run ends: what an optimiser breaks is named and never saved; what is done is written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tiny_task import get_config

import bilevel_flax as bf
from bilevel_flax.checkpoints import BestCheckpoint, CheckpointError, collective
from bilevel_flax.train import experiment, train_loop
from bilevel_flax.train.experiment import Diverged, Interrupted, train_and_evaluate


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def poisoned(where: str, part: str, at: int = 12) -> Any:
    sgd = {"call": "optax:sgd", "learning_rate": 0.1}
    poison = {"call": "tiny_task:poisoned_sgd", "at": at, "part": part}
    optimisers = {"inner": sgd, "outer": sgd, "adjoint": sgd} | {where: poison}
    return get_config(solver={"call": "bilevel_flax:soba", **optimisers})


@pytest.mark.parametrize(
    ("where", "part", "named"),
    [
        ("outer", "updates", "outer_params"),
        ("inner", "updates", "inner_params"),
        ("adjoint", "updates", "adjoint"),
        ("outer", "state", "outer_opt_state"),
    ],
)
def test_a_nan_that_an_optimiser_made_is_named_and_not_saved(
    where: str, part: str, named: str, tmp_path: Path
):
    for _ in range(2):  # the second time it goes on from the checkpoint, which is sound
        with pytest.raises(Diverged) as caught:
            train_and_evaluate(poisoned(where, part), tmp_path)
        message = str(caught.value)
        assert f"not finite: {named}" in message
        variable = {"inner": "z", "adjoint": "v", "outer": "x"}[where]
        assert f"the optimiser of {variable} made it" in message
        assert "\n" not in message
        assert steps_saved(tmp_path) == [5, 10]
        assert "the checkpoint of step 10 is kept" in message


def test_what_is_infinite_at_the_start_may_stay(tmp_path: Path):
    assert train_and_evaluate(poisoned("outer", "inf"), tmp_path)["steps"] == 20


def test_a_checkpoint_that_holds_a_nan_is_not_gone_on_from(tmp_path: Path):
    train_and_evaluate(get_config(), tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        lost = lambda self, state: "outer_params['w']"
        patch.setattr(train_loop.FiniteCheck, "first_lost", lost)
        with pytest.raises(Diverged, match=r"checkpoints/20 holds outer_params\['w'\], which is"):
            train_and_evaluate(get_config(), tmp_path)


class FailingSaves:
    """Makes the n-th save and those after it fail, as a full disk does."""

    def __init__(self, patch: pytest.MonkeyPatch, first: int):
        self.calls, self._first = 0, first
        original = collective.write

        def write(*args: Any, **kwargs: Any) -> None:
            self.calls += 1
            if self.calls >= self._first:
                raise OSError(28, "No space left on device")
            original(*args, **kwargs)

        patch.setattr(collective, "write", write)


def assert_finished(workdir: Path, summary: dict[str, Any]) -> None:
    saved = json.loads((workdir / "summary.json").read_text())
    assert saved["final"] == summary["final"]
    assert saved.keys() == summary.keys()
    assert (workdir / "report.html").stat().st_size > 1000
    _, best = BestCheckpoint(workdir / "best.npz").restore((jnp.zeros(()), None))
    network = bf.checkpoints.restore_inner(workdir / "network.npz")
    assert float(network) == float(best[0]) == pytest.approx(summary["final"])


def test_the_first_checkpoint_that_fails_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saves = FailingSaves(monkeypatch, first=1)
    with pytest.raises(CheckpointError, match="step 5 was not saved.*[Nn]o space left"):
        train_and_evaluate(get_config(), tmp_path)
    assert saves.calls == 1
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("every", "first", "required"), [(5, 2, True), (5, 1, False), (99, 1, True)]
)
def test_a_run_that_got_to_its_end_is_written_whatever_checkpoints_did(
    every: int,
    first: int,
    required: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    FailingSaves(monkeypatch, first)
    config = get_config(checkpoint={"every": every, "required": required})
    summary = train_and_evaluate(config, tmp_path)
    assert_finished(tmp_path, summary)
    printed = capsys.readouterr()
    assert "warning: " in printed.out and "step 20 was not saved" in printed.out


class Preempting:
    """A writer of metrics in whose last call the machine is taken away."""

    def write_scalars(self, step: int, scalars: Any) -> None:
        pass

    write_texts = write_scalars

    def flush(self) -> None:
        pass

    def close(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_last_step_ends_the_run_too(tmp_path: Path):
    with pytest.raises(Interrupted, match="SIGTERM: trained; the same command goes on"):
        train_and_evaluate(get_config(), tmp_path, [Preempting()])
    assert steps_saved(tmp_path)[-1] == 20
    assert not (tmp_path / "summary.json").exists()
    assert_finished(tmp_path, train_and_evaluate(get_config(), tmp_path))


def test_a_sound_run_warns_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = train_and_evaluate(get_config(), tmp_path)
    assert_finished(tmp_path, summary)
    assert "warning" not in capsys.readouterr().out
    assert summary["steps_per_second"] == pytest.approx(20 / summary["seconds"])


def test_long_final_metrics_give_a_sign_of_life(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real = experiment.Heartbeat
    monkeypatch.setattr(experiment, "Heartbeat", lambda log, doing: real(log, doing, 0.05))
    slow = {"call": "tiny_task:slow_task"}
    train_and_evaluate(get_config(task=slow), tmp_path)
    assert "... baseline 1/1: " in capsys.readouterr().out
