"""A mistake ends in one line and exit code 2, a failed run in one line and 1, a bug in a trace."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bilevel_flax import cli

ROOT = Path(__file__).parents[2]
CONFIG = "configs/mnist_hypercleaning.py:soba"
PROGRESS = ("cost:", "derivatives of", "soba:", "comp")  # what a run says before its first step
# Small, so that what gets as far as the training is soon there.
SMALL = (
    "--config.data.splits=120,60,40",
    "--config.batch_size=40",
    "--config.steps=4",
    "--config.baselines=false",
    "--config.health.every=0",
    "--config.health.summary=false",
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("BILEVEL_FLAX_TRACEBACK", raising=False)


class Outcome:
    """What a command printed and returned."""

    def __init__(self, code: int, out: str, error: str):
        self.code, self.out, self.error = code, out, error
        self.last = error.strip().splitlines()[-1] if error.strip() else ""

    def is_one_line(self) -> bool:
        lines = [line for line in self.error.splitlines() if not line.startswith(PROGRESS)]
        return len(lines) == 1 and "Traceback" not in self.error


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def command(*arguments: str) -> Outcome:
        capsys.readouterr()
        try:
            code = cli.main(list(arguments))
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return command


@pytest.fixture
def train(run: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    return lambda *overrides: run(
        "train", "--config", CONFIG, "--workdir", str(tmp_path / "run"), *SMALL, *overrides
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.stpes=3"], 'has no such key (did you mean "steps"?)'),
        (["--config.steps", "many"], "--config.steps=many: expected int"),
        (["--config.steps"], "--config.steps=: expected int"),
        (["--config.baselines=maybe"], "--config.baselines=maybe: expected bool"),
        (["--config.steps=0"], "--config.steps must be an integer >= 1, got 0"),
        (["--config.log_every=0"], "--config.log_every must be an integer >= 1, got 0"),
        (["--config.checkpoint.keep=0"], "--config.checkpoint.keep must be an integer >= 1, got 0"),
        (["--config.solver.call=bilevel_flax:sobaa"], 'did you mean "soba"?'),
        (["--config.solver.call=bilevel_flax:srba"], "missing a required argument: 'period'"),
        (["--config.solver.dampingg=1"], "has no such key"),
        (["--config.task.call=examples.nothing:make_task"], "No module named 'examples.nothing'"),
        (["--config.model=cn"], 'choose one of linear, mlp, cnn (did you mean "cnn"?)'),
        (["--config.weights=sigmoyd"], 'did you mean "sigmoid"?'),
        (["--config.noise=clas"], 'use "class"'),
        (["--config.corruption=1.5"], "--config.corruption=1.5"),
        (["--config.corruption=nan"], "--config.corruption=nan"),
        (["--config.seed=-1"], "seed"),
        (["--config.batch_size=0"], "batch_size"),
        (["--config.batch_size=61"], "batch_size must lie between 1"),
        (["--config.data.splits=30"], "splits must be three sizes"),
        (["--config.data.splits=a,b,c"], "splits"),
        (["--config.data.splits=4000,4000,4000"], "the splits ask for"),
        (["--config.data.splits=100,0,10"], "no validation examples"),
        (["--config.data.splits=100,10,-1"], "must be at least 0"),
        (["--config.data.name=mnistt"], "did you mean --config.data.name=mnist"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(
    train: Callable[..., Outcome], tmp_path: Path, overrides: list[str], message: str
):
    outcome = train(*overrides)
    assert outcome.code == 2, outcome.error
    assert message in outcome.error
    assert outcome.is_one_line(), outcome.error
    # Nothing is left behind that would stand in the way of the mended command.
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_data_are_reported_in_a_second(
    train: Callable[..., Outcome], tmp_path: Path, name: str
):
    began = time.monotonic()
    outcome = train(
        f"--config.data.name={name}",
        f"--config.data.manual_dir={tmp_path}",
        f"--config.data.data_dir={tmp_path / 'prepared'}",
    )
    seconds = time.monotonic() - began
    assert outcome.code == 2
    assert outcome.is_one_line(), outcome.error
    assert f"manual_dir={tmp_path} lacks " in outcome.error
    assert "mnist5k" in outcome.error
    assert seconds < 10  # a second or two alone; minutes if it tried to download


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "configs/mnist_hypercleanin.py", "--workdir", "x"], "did you mean"),
        (["train", "--config", "lm_pod", "--workdir", "x"], 'did you mean "configs/lm_pod.py"?'),
        (["train", "--config", "configs/mnist_hypercleaning.py:sba", "--workdir", "x"], "saba"),
        (["report", "/nowhere"], "/nowhere holds no run"),
        (["report", "x", "--config.steps=3"], "report takes no --config overrides"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
        (["train", "--config", "x"], "required: --workdir"),
    ],
)
def test_a_mistake_in_the_command(run: Callable[..., Outcome], arguments: list[str], message: str):
    outcome = run(*arguments)
    assert outcome.code == 2
    assert message in outcome.last
    assert "Traceback" not in outcome.error


def test_the_solvers_are_listed(run: Callable[..., Outcome]):
    outcome = run("solvers")
    assert outcome.code == 0
    assert "soba" in outcome.out


def test_a_workdir_that_cannot_be(train: Callable[..., Outcome], tmp_path: Path):
    (tmp_path / "run").write_text("a file")  # the folder's name is taken; root fails as well
    outcome = train()
    assert outcome.code == 2
    assert f"--workdir={tmp_path / 'run'}: File exists" in outcome.error
    assert outcome.is_one_line()


def test_a_workdir_below_a_file(run: Callable[..., Outcome], tmp_path: Path):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "run"
    outcome = run("train", "--config", CONFIG, "--workdir", str(workdir))
    assert outcome.code == 2
    assert f"--workdir={workdir}: Not a directory" in outcome.error
    assert outcome.is_one_line()


def test_a_read_only_workdir(
    train: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Tests may run as root, whom no permission stops.
    allowed = os.access
    refuse = lambda path, mode: str(path) != str(tmp_path / "run") and allowed(path, mode)
    monkeypatch.setattr(os, "access", refuse)
    outcome = train()
    assert outcome.code == 2
    assert f"--workdir={tmp_path / 'run'}: not writable" in outcome.error
    assert outcome.is_one_line()


def test_two_processes_in_one_workdir(train: Callable[..., Outcome], tmp_path: Path):
    (tmp_path / "run").mkdir()
    holder = (
        "import fcntl, os, sys, time\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        outcome = train()
        other.kill()
    assert outcome.code == 2
    assert "another process is training in it" in outcome.error
    assert outcome.is_one_line()


def write_task(folder: Path, body: str) -> str:
    """A config whose task fails in its own way; a module of another name each time."""
    (folder / "configs").mkdir()
    path = folder / "configs" / "mine.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    module = f"task_of_{folder.name}"
    (folder / f"{module}.py").write_text(f"def make_task(config):\n{lines}\n")
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({\n"
        "        'seed': 0, 'steps': 3, 'log_every': 1, 'eval_every': 1, 'on_device': True,\n"
        "        'checkpoint': {'every': 1, 'keep': 1}, 'report': '',\n"
        f"        'task': {{'call': '{module}:make_task'}},\n"
        "        'solver': {'call': 'bilevel_flax:soba', 'inner': {'call': 'optax:sgd',\n"
        "            'learning_rate': .1}, 'outer': {'call': 'optax:sgd', 'learning_rate': .1}},\n"
        "    })\n"
    )
    return str(path)


TASK = """
import numpy as np, jax.numpy as jnp
import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.train.task import (InitialValues, Task)
parts = data.partition({'y': np.ones(4, np.float32)}, 2)
return Task(
    problem=bf.Problem(INNER, lambda z, x, batch: jnp.mean((z - batch['y']) ** 2), PER_SAMPLE),
    init=lambda rng: InitialValues(jnp.zeros(()), OUTER),
    inner=INNER_DATA, outer=parts, evaluate=lambda state: {},
)
"""


def task_body(
    inner: str = "lambda z, x, batch: jnp.mean((z - x - batch['y']) ** 2)",
    outer: str = "jnp.zeros(())",
    per_sample: str = "",
    inner_data: str = "parts",
) -> str:
    body = TASK.strip().replace("INNER_DATA", inner_data).replace("INNER", inner)
    return body.replace("OUTER", outer).replace("PER_SAMPLE", per_sample)


@pytest.fixture
def own(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Outcome]:
    def command(body: str) -> Outcome:
        spec = write_task(tmp_path, body)
        return run("train", "--config", spec, "--workdir", str(tmp_path / "run"))

    return command


PER_SAMPLE = {
    "inner": "lambda z, x, batch: jnp.mean(x * (z - batch['y']) ** 2)",
    "outer": "jnp.ones(4)",
    "per_sample": "per_sample=True",
}
NO_INDEX = "data.FiniteSum({'y': parts.batches['y']}, parts.weights, 4, 2, 2)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            task_body(inner="lambda z, x, batch: jnp.mean((z - batch['y']) ** 2)"),
            "inner_loss never uses outer_params",
        ),
        (task_body(inner="lambda z, x, batch: (z - x - batch['y']) ** 2"), "scalar"),
        (task_body(**PER_SAMPLE, inner_data=NO_INDEX), 'batch["index"]'),
        ("raise ValueError('labels must lie in [0, 10), got 11: relabel them')", "got 11"),
        ("from bilevel_flax import data\ndata.check_labels([0, 11], 10, 'labels')", "11"),
    ],
)
def test_a_mistake_in_the_losses_or_data_is_one_line(
    own: Callable[[str], Outcome], body: str, message: str
):
    outcome = own(body)
    assert outcome.code == 2, outcome.error
    assert message in outcome.last
    assert outcome.is_one_line(), outcome.error


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("return {}['missing']", "KeyError"),
        ("return int('x')", "ValueError"),
        ("return config.steps + 'x'", "TypeError"),
        ("import jax.numpy as jnp\nreturn jnp.zeros(3) @ jnp.zeros(4)", "TypeError"),
        ("import json\nreturn json.loads('{')", "JSONDecodeError"),
        ("raise RuntimeError('boom')", "RuntimeError"),
        ("raise AssertionError", "AssertionError"),
    ],
)
def test_a_bug_is_shown_with_its_trace(own: Callable[[str], Outcome], body: str, name: str):
    outcome = own(body)
    assert outcome.code == 1
    assert "Traceback (most recent call last)" in outcome.error
    assert name in outcome.error
    assert "make_task" in outcome.error
    assert outcome.last.startswith("error: the above is a bug in bilevel_flax or in the task")


def test_the_trace_of_a_mistake_can_be_asked_for(
    train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BILEVEL_FLAX_TRACEBACK", "1")
    outcome = train("--config.stpes=3")
    assert outcome.code == 2
    assert "Traceback" in outcome.error
    assert "did you mean" in outcome.last


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writes beyond this size fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_loses_nothing(train: Callable[..., Outcome], tmp_path: Path):
    # The checkpoints' arrays do not fit any more; config and metrics do.
    with largest_file(6_000):
        outcome = train("--config.checkpoint.every=2")
    assert outcome.code == 1
    assert "Traceback" not in outcome.error
    assert "The checkpoint of step 2 was not saved: a file would exceed the size" in outcome.last
    assert "--config.checkpoint.required=False" in outcome.last
    assert not (tmp_path / "run" / "summary.json").exists()
    # With room again the same command goes on, or starts anew where nothing could be saved.
    outcome = train("--config.checkpoint.every=2")
    assert outcome.code == 0, outcome.error
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_old_key_is_warned_of_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = tmp_path / "old.py"
    config.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    config = ml_collections.ConfigDict({'steps': 5, 'health': {'share': 0.03}})\n"
        "    config.task = {'call': 'no_such_module:make_task'}\n"
        "    config.solver = {'call': 'bilevel_flax:soba'}\n"
        "    return config\n"
    )
    assert cli.main(["train", "--config", str(config), "--workdir", str(tmp_path / "run")]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "health.share" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: config.health.share=0.03 is now config.health.every=None")
