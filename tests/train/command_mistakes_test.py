"""Mistakes in a command: each ends in one line that names the option, the value and the way out.

A row is (the command, words that its one line has). Nothing trains: what needs data reads the
digits, what needs a config loads one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from bilevel_flax import cli

ROOT = Path(__file__).parents[2]
CONFIG = "configs/mnist_hypercleaning.py"
FILES = {
    "open.py": "def get_config(:\n",
    "nothing.py": "x = 1\n",
    "two.py": "def get_config(a, b):\n    return a\n",
    "import.py": "import not_there.at_all\n",
    "list.py": "def get_config():\n    return [1]\n",
    "text.md": "A page.\n",
    "file": "",
    "taken/other": "",
    "cut/config.json": "{",
    "bytes/config.json": "\0",
    "list/config.json": "{}",
    "list/summary.json": "[1, 2]",
    "list/metrics.jsonl": '{"step": 1, "loss": NaN}\nnot JSON\n',
    "none/config.json": "{}",
    "none/summary.json": json.dumps({"mixture": {"a": 0.9, "b": 0.9}}),
    "fine/config.json": "{}",
    "fine/summary.json": json.dumps({"mixture": {"a": 0.5, "b": 0.5}}),
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files that the commands name, as FOLDER/name."""
    place = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content)
    with chdir(ROOT):
        yield place


def train(*overrides: str, config: str = f"{CONFIG}:soba", workdir: str = "FOLDER/run") -> list:
    return ["train", "--config", config, "--workdir", workdir, *overrides]


def plan(*options: str) -> list:
    return ["plan", "--config", CONFIG, *options]


def bench(*options: str) -> list:
    return ["bench", "quadratics", *options]


def mixture(run: str, *options: str, to: str = "json") -> list:
    return ["mixture", run, "--to", to, "--out", "FOLDER/out", *options]


COMMANDS: list[tuple[list[str], str]] = [
    ([], "required: COMMAND"),
    (["Train"], r"invalid choice: 'Train' \(choose from.*train"),
    (["train", "--workdir", "x"], "required: --config"),
    (["solvers", "x"], "unrecognized arguments: x"),
    (["solvers", "--config.steps=3"], "solvers takes no --config overrides"),
    (["new", "nope"], r"no recipe 'nope': choose one of .*mnist_hypercleaning"),
    (["new", "mnist_hypercleaning", "FOLDER/file"], "FOLDER/file is no folder"),
    (["new", "a", "b", "c"], "unrecognized arguments: c"),
    # --- the config
    (train(config=""), "--config=: no file"),
    (train(config="configs"), "--config=configs: no file configs"),
    (train(config="FOLDER/open.py"), "open.py, line 1 is no Python: .*"),
    (train(config="FOLDER/two.py"), r"get_config\(a, b\) is called with nothing.*:ARGUMENT"),
    (train(config="FOLDER/two.py:x"), r"get_config\(a, b\) is called with 'x' \(missing.*'b'"),
    (train(config="FOLDER/import.py"), "it imports not_there, which is not there: install it"),
    (train(config="FOLDER/text.md"), "text.md is no Python file; a config is one, FILE.py"),
    (train(config="FOLDER/nothing.py"), r"nothing.py defines no get_config\(\)"),
    (train(config="FOLDER/list.py"), r"get_config\(\) returned a list"),
    (train(config=f"{CONFIG}:SOBA"), "choose one of soba, saba"),
    (train(config=f"{CONFIG}:soba:x"), 'did you mean "soba"'),
    (train("--config=steps"), "--config=steps: no file steps"),
    # --- its keys
    (train("--config.steps=1e3"), "--config.steps=1e3: expected int"),
    (train("--config.steps=-5"), "--config.steps must be an integer >= 1, got -5"),
    (train("--config.steps=99999999999"), "--config.steps=99999999999: must be at most 2147483647"),
    (train("--config."), "--config.: the config has no such key"),
    (train("--config.data=3"), "--config.data: it has several keys, set one: data.data_dir"),
    (train("--config.data.name.x=3"), "--config.data.name.x: the config has no such key"),
    (train("--config.unknown.key=3"), "--config.unknown.key: the config has no such key"),
    (train("--config.seed=-3"), "--config.seed must be an integer >= 0, got -3"),
    (train("--config.seed=4294967296"), "--config.seed=4294967296: must be at most 4294967295"),
    (train("--config.seed=1.5"), "--config.seed=1.5: expected int"),
    (train("--config.eval_every=-1"), "--config.eval_every must be an integer >= 1, got -1"),
    (train("--config.checkpoint=3"), "--config.checkpoint: it has several keys.*checkpoint.every"),
    (train("--config.health.every=-3"), "--config.health.every must be an integer >= 0"),
    (train("--config.baselines=2"), "--config.baselines=2: expected bool"),
    (train("--config.corruption=50%"), "--config.corruption=50%: expected float"),
    (train("--steps=3"), "unrecognized arguments: --steps=3"),
    (train("steps=3"), "unrecognized arguments: steps=3"),
    (train("--num-processes", "two"), "--num-processes: invalid int value: 'two'"),
    # --- its calls and data
    (train("--config.solver.call=soba"), '"soba": write "package.module:attribute"'),
    (train("--config.solver.call=:"), '":": write "package.module:attribute"'),
    (train("--config.solver.call=os:system"), "os:system takes no argument"),
    (train("--config.solver.call=bilevel_flax.no:x"), "No module named 'bilevel_flax.no'"),
    (train("--config.solver.inner.call=optax:sgdd"), 'did you mean "sgd"'),
    (train("--config.solver.inner=0.1"), "--config.solver.inner: it has several keys"),
    (train("--config.model="), "--config.model=: choose one of linear, mlp, cnn"),
    (train("--config.data.name="), 'data set ""'),
    (train("--config.data.name=imagenet"), "did you mean --config.data.name=imagenette"),
    (train("--config.data.splits=1e2,60,40"), "size of the train split must be an integer"),
    (train("--config.data.splits=120,60,0"), "no test examples"),
    # --- the folder
    (train(workdir="FOLDER/taken"), r"--workdir=.*taken: the folder is not empty.*choose another"),
    (train(workdir=""), "--workdir: it is empty: give a path"),
    (train(workdir="/dev/null/x"), "--workdir=/dev/null/x: Not a directory"),
    # --- report
    (["report"], "required: DIR"),
    (["report", "FOLDER/file"], "file holds no run"),
    (["report", "FOLDER/taken"], r"taken holds no run \(no config.json\)"),
    (["report", "FOLDER/cut"], "cut/config.json is damaged"),
    (["report", "FOLDER/bytes"], "bytes/config.json is damaged"),
    (["report", "FOLDER/list", "--trust"], "summary.json: expected a JSON object, got a list"),
    # --- mixture
    (["mixture", "FOLDER/fine"], "required: --to, --out"),
    (mixture("FOLDER/fine", to="csv"), "--to=csv: choose one of maxtext"),
    (mixture("FOLDER/taken"), "taken has no summary.json"),
    (mixture("FOLDER/list"), "summary.json is damaged"),
    (mixture("FOLDER/none"), "is no mixture.*with the sum 1.8"),
    (mixture("FOLDER/fine", "--stages", "0"), "--stages must be an integer >= 1, got 0"),
    (mixture("FOLDER/fine", "--stages", "1000000000"), "--stages=1000000000: give 1000 or fewer"),
    (mixture("FOLDER/fine", "--stage", "2"), "--stage=2: --to json takes all stages"),
    (mixture("FOLDER/fine", "--tokens", "-3"), "--tokens must be an integer >= 1, got -3"),
    # --- bench
    (["bench", "quadratic"], 'did you mean "quadratics"'),
    (bench("--solvers", "sobaa"), "solver 'sobaa' is unknown: choose some of"),
    (bench("--solvers", ""), "--solvers is empty: choose some of"),
    (bench("--seconds", "nan"), "--seconds=nan: give a positive number"),
    (bench("--seconds", "1s"), "--seconds: invalid float value: '1s'"),
    (bench("--seeds", "0"), "--seeds=0: give 1 or more"),
    (bench("--grid", "64"), "--grid=64: there are 63 pairs"),
    (bench("--clock", "gpu"), "--clock=gpu: choose one of wall, cpu"),
    (bench("--out", "FOLDER/file"), "file: a file is in the way, choose a folder"),
    (bench("--clean", "3"), "--clean is an option of `bench cleaning`"),
    (["bench", "cleaning", "--noise", "gauss"], "--noise=gauss: choose one of symmetric"),
    (["bench", "cleaning", "--steps", "0"], "--steps=0: give whole numbers of 1 or more"),
    (["bench", "ijcnn1", "--manual-dir", "/nope"], "--manual-dir=/nope: no such folder"),
    # --- plan
    (plan(), "required: --topology"),
    (plan("--topology", "v9:2x2"), "--topology=v9:2x2: unknown, choose among v4"),
    (plan("--topology", "cpu:0"), "--topology=cpu:0: give a generation and a shape"),
    (plan("--topology", "v5e:3x5x7"), "v5e chips form a torus of 2 axes"),
]


@pytest.mark.parametrize(
    ("command", "message"), COMMANDS, ids=[" ".join(row[0])[-60:] for row in COMMANDS]
)
def test_it_is_one_line(
    folder: Path,
    command: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("BILEVEL_FLAX_TRACEBACK", raising=False)
    try:
        code = cli.main([part.replace("FOLDER", str(folder)) for part in command])
    except SystemExit as error:  # argparse
        code = error.code
    error = capsys.readouterr().err.replace(str(folder), "FOLDER")
    assert code == 2, error
    lines = error.strip().splitlines()
    assert re.search(message, lines[-1])
    assert len(lines) == 1 or lines[0].startswith("usage:"), error
    assert "Traceback" not in error
    assert not list((folder / "run").glob("*"))
