"""The scripts of benchmarks/ name what there is, and so do the commands of their pages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py")) + sorted(
    (ROOT / "benchmarks/tasks").glob("*.py")
)
COMMAND = re.compile(r"python (?:-m pytest (?:-m slow )?)?((?:benchmarks|tests)/\S+\.py)(.*)")


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("bilevel_flax", "examples", "benchmarks")


def names_in(path: Path) -> list[tuple[str, str | None]]:
    """(module, attribute) for all that a script asks of this project's modules."""
    modules, used = {}, []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_ours(alias.name):
                    modules[alias.asname or alias.name.partition(".")[0]] = alias.name
                    used.append((alias.name, None))
        elif isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                used.append((node.module, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.append((modules.get(node.value.id, ""), node.attr))
    return [(module, name) for module, name in used if module]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_what_there_is(path: Path):
    for module, name in names_in(path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # by its present name
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError as error:
                spec = importlib.util.find_spec(module) if module != error.name else None
                if spec and spec.origin:  # an adapter, whose package is not here
                    assert re.search(rf"^(class|def) {name}\b", Path(spec.origin).read_text(), re.M)
                    continue
                parent, _, last = module.rpartition(".")
                found = getattr(importlib.import_module(parent), last, None)
                assert found is not None, error
            if name is not None and isinstance(found, ModuleType):
                there = hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}")
                assert there, f"{module} has no {name}"


def test_the_commands_of_the_pages_name_scripts_and_options_that_there_are():
    pages = sorted((ROOT / "benchmarks").rglob("*.md"))
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = COMMAND.findall(text)
    assert len(commands) > 15
    shared = (ROOT / "benchmarks" / "rows.py").read_text()  # what every benchmark takes
    for script, arguments in commands:
        source = (ROOT / script).read_text()
        if re.search(r"\bimport rows\b|\bfrom \S*rows import\b", source):
            source += shared
        for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", arguments):
            assert f'"{option}"' in source, (script, option)
    for config in set(re.findall(r"configs/\w+\.py", text)):
        assert (ROOT / config).is_file(), config
    for module in set(re.findall(r"python -m (examples\.[\w.]+)", text)):
        assert importlib.util.find_spec(module), module


def test_every_page_of_results_names_a_command():
    for page in (ROOT / "benchmarks/results").glob("*.md"):
        assert re.search(
            r"(?:^ {4}|`)[A-Z_=0-9]*\s?(?:python|bilevel-flax) ", page.read_text(), re.M
        ), page


def test_every_script_prints_its_tables_by_the_one_option():
    commands = [path for path in SCRIPTS if "ArgumentParser" in path.read_text()]
    assert len(commands) > 15
    for path in commands:
        if path.stem not in ("rows", "lm_data_mixing"):  # the latter's tables are made of its runs
            assert "add_argument(parser)" in path.read_text(), path.name
            shown = re.search(
                r"Rows\(|^from benchmarks\.\w+ import .*\breport\b", path.read_text(), re.M
            )
            assert shown, path.name


def test_rows_are_lines_or_a_table_under_what_was_run_where(capsys, monkeypatch):
    from benchmarks.rows import Rows

    monkeypatch.setattr("sys.argv", ["benchmarks/made_up.py", "--steps", "3", "--markdown"])
    for as_table in (False, True):
        with Rows(as_table) as rows:
            rows.add({"method": "soba", "error": 0.25})
            rows.add({"method": "a|b", "error": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["method soba  error 0.25", "method a|b  error 0.5"]
    assert lines[2].startswith("`python benchmarks/made_up.py --steps 3`: ")
    assert "CPU cores" in lines[2] and "jax " in lines[2]
    assert lines[4:6] == ["| method | error |", "|---|---|"]
    assert lines[7] == "| a\\|b | 0.5 |"


def test_rows_of_several_titles_are_several_tables(capsys, monkeypatch):
    from benchmarks.rows import Rows

    monkeypatch.setattr("sys.argv", [str(ROOT / "examples/few_shot/costs.py"), "--markdown"])
    for as_table in (False, True):
        with Rows(as_table) as rows:
            rows.add({"n": 1, "µs": 2}, "Time")
            rows.add({"n": 1, "MB": 3}, "Memory")
            rows.add({"n": 2, "µs": 4, "note": "slow"}, "Time")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["Time", "n 1  µs 2", "Memory", "n 1  MB 3"]
    caption, *tables = "\n".join(lines[5:]).split("\n\n")
    assert caption.startswith("`python -m examples.few_shot.costs`: ")
    assert tables[:2] == [
        "Time",
        "| n | µs | note |\n|---|---|---|\n| 1 | 2 |  |\n| 2 | 4 | slow |",
    ]
    assert tables[2:] == ["Memory", "| n | MB |\n|---|---|\n| 1 | 3 |"]


def test_a_table_is_left_out_where_the_benchmark_failed(capsys):
    from benchmarks.rows import Rows

    with pytest.raises(KeyError), Rows(True) as rows:
        rows.add({"n": 1})
        raise KeyError
    assert capsys.readouterr().out == ""
