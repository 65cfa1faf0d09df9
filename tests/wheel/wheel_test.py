"""The wheel as its users find it: the README's commands, to the letter, in an empty folder.

    make test-wheel

builds the wheel and installs it into environments of its own, with the Python that
BILEVEL_FLAX_WHEEL_PYTHON names. An environment that is there already is named by
BILEVEL_FLAX_WHEEL_ENV (with [all]) or BILEVEL_FLAX_PLUGIN_ENV (without extras).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = os.environ.get("BILEVEL_FLAX_WHEEL_PYTHON", sys.executable)
MEGABYTE = 2**20
# What is added to a command of the README, so that it takes seconds.
SHORT = {" train ": " --config.epochs=2", " bench ": " --seconds 1"}


def commands() -> list[str]:
    """What the README tells to type, in its order: indented lines, and `bilevel-flax ...`."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    found = re.findall(r"^    (\S.*)$|`(bilevel-flax [^`]+)`", text, re.MULTILINE)
    return [block or inline for block, inline in found if not block.startswith("pip ")]


def installs() -> list[str]:
    return re.findall(r"^    (pip install .+)$", README, re.MULTILINE)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), "."]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


class Environment:
    """A virtual environment and a folder to give commands in."""

    def __init__(self, venv: Path, folder: Path):
        self.venv, self.folder = venv, folder
        folder.mkdir(exist_ok=True)

    def __call__(self, command: str, folder: Path | None = None, **variables: str):
        mine = ("PYTHON", "PYTEST", "BILEVEL_FLAX", "VIRTUAL_ENV", "JAX_NUM", "XLA_FLAGS")
        env = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        env |= {"PATH": f"{self.venv / 'bin'}:{env['PATH']}", "JAX_PLATFORMS": "cpu"} | variables
        return subprocess.run(
            ["bash", "-c", command],
            cwd=folder or self.folder,
            env=env,
            capture_output=True,
            text=True,
        )


def environment(venv: Path, folder: Path, wheel: Path, command: str, made: str) -> Environment:
    if made in os.environ:
        return Environment(Path(os.environ[made]), folder)
    subprocess.run([PYTHON, "-m", "venv", str(venv)], check=True)
    there = Environment(venv, folder)
    done = there(command, PIP_FIND_LINKS=str(wheel.parent), PIP_DISABLE_PIP_VERSION_CHECK="1")
    assert done.returncode == 0, done.stderr
    return there


@pytest.fixture(scope="session")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The environment that the README's first line makes."""
    folder = tmp_path_factory.mktemp("all")
    (install,) = installs()
    return environment(folder / "venv", folder / "empty", wheel, install, "BILEVEL_FLAX_WHEEL_ENV")


@pytest.fixture(scope="session")
def plugin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The plug-in without extras."""
    assert "`pip install bilevel-flax`" in README
    folder = tmp_path_factory.mktemp("plugin")
    install = "pip install bilevel-flax"
    return environment(folder / "venv", folder / "empty", wheel, install, "BILEVEL_FLAX_PLUGIN_ENV")


def test_the_wheel_holds_what_it_should(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    shipped = {
        name.removeprefix("bilevel_flax/_shipped/"): size
        for name, size in sizes.items()
        if name.startswith("bilevel_flax/_shipped/")
    }
    tracked = subprocess.run(
        ["git", "ls-files", "configs", "examples", "benchmarks/tasks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(shipped) == {name for name in tracked if not name.endswith("_test.py")}
    assert max(sizes.values()) < MEGABYTE
    assert "bilevel_flax/py.typed" in sizes
    outside = {name.partition("/")[0] for name in sizes}
    assert len(outside) == 2  # the package and its dist-info: no stray top-level folder


def test_the_folder_sees_the_wheel_and_not_the_checkout(run):
    done = run("python -c 'import bilevel_flax; print(bilevel_flax.__file__)'")
    assert Path(done.stdout.strip()).is_relative_to(run.venv)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme(run, command):
    short = "".join(more for word, more in SHORT.items() if word in command)
    done = run(command + short)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stdout
    if " train " in command:
        left = {path.name for path in (run.folder / "runs" / "clean").iterdir()}
        assert left >= {"report.html", "summary.json", "suspicious.csv", "checkpoints"}
        assert "suspicious" in (run.folder / "runs" / "clean" / "report.html").read_text()
        summary = json.loads((run.folder / "runs" / "clean" / "summary.json").read_text())
        assert summary["wrong_label_auc"] > 0.8


def test_the_loop_of_the_readme(run, plugin):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code += "assert state.outer_params[3] < -1 < 0 < state.outer_params[:3].min(), state\n"
    for where in (run, plugin):
        (where.folder / "loop.py").write_text(code)
        done = where("python loop.py")
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_recipes_and_tasks_of_the_bench_are_whole_in_the_wheel(run, tmp_path):
    code = """
from pathlib import Path
from bilevel_flax.bench.tasks import PROTOCOLS, TASKS
from bilevel_flax.distribution import recipes, shipped
from bilevel_flax.train import config
shipped.make_importable()
for name in recipes.names():
    recipes.copy(name, Path())
for name in recipes.names():
    loaded = config.load(f"configs/{name}.py")
    config.imported(loaded.task.call)
    loaded.report and config.imported(loaded.report)
    print(name)
for place in {*TASKS.values(), *PROTOCOLS.values()}:
    config.imported(place)
"""
    done = run(f"python -c '{code}'", tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {path.stem for path in (ROOT / "configs").glob("*.py")}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "bilevel-flax train --config configs/mnist_hypercleaning.py --workdir runs/a",
            "bilevel-flax new mnist_hypercleaning",
        ),
        ("bilevel-flax bench quadratic", 'did you mean "quadratics"?'),
        ("bilevel-flax new mnist .", 'did you mean "mnist_hypercleaning"?'),
    ],
)
def test_a_mistake_in_an_empty_folder_is_one_line(run, tmp_path, command, message):
    done = run(command, tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_without_extras_the_plugin_works_and_the_harness_names_them(plugin):
    assert plugin("bilevel-flax solvers").returncode == 0
    assert plugin("bilevel-flax new lm_pod").returncode == 0
    for command in ("train --config configs/lm_pod.py:tiny --workdir runs/a", "bench quadratics"):
        done = plugin(f"bilevel-flax {command}")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.endswith("is not installed: pip install 'bilevel-flax[train]'")
