"""A run's folder of somebody else's: its config names code, and none of it runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny_task

from bilevel_flax import cli
from bilevel_flax.train import experiment
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.report import trusted

ROOT = Path(__file__).parents[2]

NEVER = (
    "shutil:rmtree",
    "os:system",
    "os:remove",
    "posix:system",
    "builtins:eval",
    "builtins:exec",
    "subprocess:run",
    "runpy:run_path",
    "pickle:load",
    "numpy:load",
    "bilevel_flax.cli:main",
    "bilevel_flax.train.experiment:make_report",
    "bilevel_flax.train.workdir:os",
    "bilevel_flax.train.report.page:write_report",
    "examples.mnist_hypercleaning.report:Path",
    "examples.mnist_hypercleaning.report:write_suspicious_csv",
    "examples.mnist_hypercleaning.report:sections.__globals__",
    "examples.mnist_hypercleaning:sections",
    "examples.no_such.report:sections",
    "payload:sections",
    "inner.payload:sections",
    "../payload:sections",
    "/payload:sections",
    ".payload:sections",
    "payload",
    ":",
    "",
    5,
    ["shutil:rmtree"],
    {"call": "shutil:rmtree"},
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with code of its own in it; the command is given beside it."""
    folder = tmp_path / "run"
    (folder / "inner").mkdir(parents=True)
    for path in (folder / "payload.py", folder / "inner" / "payload.py"):
        path.write_text(
            "import pathlib\n"
            "pathlib.Path(__file__).with_name('executed').touch()\n"
            "def sections(workdir):\n    return []\n"
        )
    (folder / "summary.json").write_text('{"solver": "soba", "steps": 5}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


@pytest.fixture(autouse=True)
def alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must not be called ends the test, and harms nobody."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"called with {args} {kwargs}")

    for module, name in ((shutil, "rmtree"), (os, "system")):
        monkeypatch.setattr(module, name, refuse)


def report(folder: Path, name: object, *flags: str) -> tuple[int, str]:
    (folder / "config.json").write_text(json.dumps({"report": name}))
    code = cli.main(["report", str(folder), *flags])
    return code, (folder / "report.html").read_text()


@pytest.mark.parametrize("flags", [(), ("--trust",)], ids=["", "trust"])
@pytest.mark.parametrize("name", NEVER, ids=str)
def test_what_is_not_ours_is_never_called(
    folder: Path, name: object, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    sys.path.insert(0, str(folder))  # the worst place to stand
    code, page = report(folder, name, *flags)
    assert code == 0  # the rest of the report is there
    assert "soba" in page
    assert not list(folder.rglob("executed"))
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--trust",)], ids=["", "trust"])
def test_a_run_folder_as_working_directory_runs_nothing(
    folder: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    shadow = folder / "examples" / "mnist_hypercleaning"
    shadow.mkdir(parents=True)
    shutil.copy(folder / "payload.py", shadow / "report.py")
    monkeypatch.chdir(folder)
    for name in ("payload:sections", "examples.mnist_hypercleaning.report:sections"):
        report(folder, name, *flags)
    assert not list(folder.rglob("executed"))


def test_the_working_directorys_own_module_needs_trust(folder: Path, tmp_path: Path):
    (tmp_path / "my_sections.py").write_text(
        "from shutil import rmtree\n"
        "from bilevel_flax.train.report.page import Section\n"
        "def sections(workdir):\n    return [Section('Mine', workdir.name)]\n"
    )
    assert "Mine" not in report(folder, "my_sections:sections")[1]
    assert "my_sections" not in sys.modules
    assert "<h2>Mine</h2>run" in report(folder, "my_sections:sections", "--trust")[1]
    # What it imported is not its own.
    with pytest.raises(trusted.UntrustedError, match=r"defines no function rmtree\(\)"):
        trusted.find_sections("my_sections:rmtree", folder, trust=True)


def test_shipped_sections_need_no_trust():
    names = set()
    for path in (ROOT / "configs").glob("*.py"):
        names |= set(re.findall(r'config\.report = "(.*?)"', path.read_text()))
    assert len(names) >= 5
    for name in names:
        function = trusted.find_sections(name, Path("/nowhere"))
        assert f"{function.__module__}:{function.__name__}" == name
    assert trusted.find_sections("examples.darts.micro_task:sections", Path("/nowhere"))  # moved


@pytest.mark.parametrize("name", ["report.html", "report.html.new"])
def test_a_link_in_the_folder_is_not_written_through(folder: Path, tmp_path: Path, name: str):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / name).symlink_to(victim)
    report(folder, None)
    assert victim.read_text() == "mine"
    assert "soba" in (folder / "report.html").read_text()


def test_a_folders_config_is_compared_and_never_resolved(folder: Path):
    call = {"call": "shutil:rmtree", "path": str(folder)}
    saved = {"task": call, "solver": {"call": "payload:sections"}, "report": "payload:sections"}
    (folder / "config.json").write_text(json.dumps(saved))
    sys.path.insert(0, str(folder))
    with pytest.raises(ConfigError, match="another config"):
        experiment.train_and_evaluate(tiny_task.get_config(), folder)
    assert not list(folder.rglob("executed"))


def test_training_takes_the_sections_of_its_own_config_and_not_the_folders(folder: Path):
    (folder / "config.json").write_text('{"report": "payload:sections"}')
    experiment.make_report(folder, "examples.mnist_hypercleaning.report:sections")
    assert not list(folder.rglob("executed"))
