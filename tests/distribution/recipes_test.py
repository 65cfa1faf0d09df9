"""`bilevel-flax new`: what it copies is whole, is what came with the package, and is never lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bilevel_flax import cli
from bilevel_flax.distribution import recipes

ROOT = Path(__file__).parents[2]


def new(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["new", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_every_config_is_listed_with_its_first_line(capsys):
    code, out, _ = new(capsys)
    assert code == 0
    for path in (ROOT / "configs").glob("*.py"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"{path.stem} "))
        assert line.split(None, 1)[1] in path.read_text().splitlines()[0]


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs").glob("*.py")])
def test_a_copy_holds_all_examples_that_it_names(name, tmp_path):
    written = recipes.copy(name, tmp_path)
    assert Path("configs", f"{name}.py") in written
    assert not [path for path in written if path.stem.endswith("_test")]
    sources = [(tmp_path / path).read_text() for path in written if path.suffix == ".py"]
    words = set(re.findall(r"\bexamples\.(\w+)", "\n".join(sources)))
    named = {word for word in words if (ROOT / "examples" / word).is_dir()}
    assert named >= {"datasets"} or name.startswith(("lm_", "few_shot"))
    for example in named:
        original = ROOT / "examples" / example
        there = {path.relative_to(ROOT) for path in original.rglob("*") if path.is_file()}
        copied = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
        assert {path for path in there if not str(path).endswith(("_test.py", ".pyc"))} <= copied


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs").glob("*.py")])
def test_what_to_type_next_is_what_its_config_begins_with(name, tmp_path, capsys):
    _, out, _ = new(capsys, name, str(tmp_path))
    command = out.splitlines()[-1].strip()
    assert command.startswith(f"bilevel-flax train --config configs/{name}.py")
    assert f"    {command}" in (ROOT / "configs" / f"{name}.py").read_text().splitlines()[2]


def test_an_edited_copy_is_taken_and_the_other_examples_are_found(tmp_path):
    recipes.copy("lm_pod", tmp_path)
    stray = tmp_path / "site-packages" / "examples"
    stray.mkdir(parents=True)
    (stray / "__init__.py").touch()
    code = """
import sys
sys.path[:] = ["", *(p for p in sys.path if not p.endswith("site-packages")), "site-packages",
    *(p for p in sys.path if p.endswith("site-packages"))]
from bilevel_flax.distribution import shipped
shipped.make_importable()
from examples.language_model import model
from examples.datasets import catalog
print(model.__file__, catalog.__file__, sep="\\n")
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model, catalog = map(Path, done.stdout.splitlines())
    assert model == tmp_path / "examples" / "language_model" / "model.py"
    assert catalog == ROOT / "examples" / "datasets" / "catalog.py"


def test_a_changed_file_is_not_overwritten(capsys, tmp_path):
    assert new(capsys, "lm_pod", str(tmp_path))[0] == 0
    config = tmp_path / "configs" / "lm_pod.py"
    missing = tmp_path / "examples" / "language_model" / "text.py"
    config.write_text("# mine\n")
    missing.unlink()
    code, _, error = new(capsys, "lm_pod", str(tmp_path))
    assert code == 2
    assert str(config) in error
    assert "differs" in error
    assert config.read_text() == "# mine\n"
    assert not missing.exists()  # all of a recipe or nothing of it


def test_what_is_there_already_is_left_and_the_rest_completed(capsys, tmp_path):
    new(capsys, "lm_pod", str(tmp_path))
    missing = tmp_path / "examples" / "language_model" / "text.py"
    missing.unlink()
    code, out, _ = new(capsys, "lm_pod", str(tmp_path))
    assert code == 0
    assert out.splitlines()[0] == "examples/language_model/text.py"
    assert "there already" in new(capsys, "lm_pod", str(tmp_path))[1]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("mnist_hypercleanin", "mnist_hypercleaning"),
        ("mnist", "mnist_hypercleaning"),
        ("hypercleaning", "mnist_hypercleaning"),
        ("configs/lm_pod.py", "lm_pod"),
        ("DARTS_mnist", "darts_mnist"),
    ],
)
def test_an_unknown_name_gets_the_nearest(capsys, tmp_path, name, nearest):
    code, _, error = new(capsys, name, str(tmp_path))
    assert code == 2
    assert len(error.splitlines()) == 1
    assert f'did you mean "{nearest}"?' in error
    assert not list(tmp_path.iterdir())


def test_a_file_as_folder_is_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, _, error = new(capsys, "lm_pod", str(tmp_path / "file"))
    assert (code, len(error.splitlines())) == (2, 1)
    assert "no folder" in error


def test_the_version_names_the_stack(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("bilevel-flax ")
    assert all(name in out for name in ("Python", "jax", "flax", "optax"))
