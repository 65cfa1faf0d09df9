"""The imports flow one way, derivatives have one home, and nothing unpickles."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bilevel_flax"

# Lowest first; a module may import its own layer and those below. Anything else is on top.
LAYERS = (
    {"base"},
    {"rows", "losses", "linear", "oracles", "shares", "freezing"},
    {"checks", "single_loop", "turns"},
    {"outer", "adjoint", "solvers"},
)
# What the layers above must not need: a loop of one's own does without.
FOR_THE_LOOP = {"data", "sharding", "checkpoint", "diagnostics", "train", "task", "loop", "cli"}
DERIVATIVES = {
    "grad",
    "value_and_grad",
    "jvp",
    "vjp",
    "linearize",
    "linear_transpose",
    "hessian",
    "jacfwd",
    "jacrev",
    "jacobian",
    "hvp",
}
# The files of `oracles` that differentiate; its others call losses and put results together.
DERIVATIVE_CODE = {"products", "pieces", "forward", "linear"}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """`oracles`, `solvers`, `data`: the first part below the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, those inside functions included."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("bilevel_flax.")}


def layer(name: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if name in names), len(LAYERS))


@every_file
def test_imports_lead_downwards(path: Path):
    name = name_of(path)
    if name == "__init__":
        return
    above = {other for other in own_imports(path) if layer(other) > layer(name)}
    assert not above, f"{name} imports {above} from a layer above"
    if layer(name) < len(LAYERS):
        assert not own_imports(path) & FOR_THE_LOOP


@every_file
def test_data_and_checkpoints_know_nothing_of_the_loop(path: Path):
    if name_of(path).startswith(("data", "checkpoint", "distributed")):
        others = own_imports(path) - {"base"}
        known = ("data", "checkpoint", "fingerprint", "distributed")
        assert all(other.startswith(known) for other in others)


def test_only_the_command_line_imports_the_command_line():
    for path in FILES:
        assert "cli" not in own_imports(path), path
        if name_of(path) not in ("cli", "bench", "train"):
            assert "train" not in own_imports(path), path


def test_the_loop_names_no_solver():
    solvers = {path.stem for path in (PACKAGE / "solvers").glob("*.py")} - {"__init__"}
    for name in ("train", "host_loop", "loop", "feed", "task", "window", "progress", "health"):
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        words = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        words |= {node.value for node in ast.walk(ast.parse(text)) if _is_text(node)}
        assert not words & solvers


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@every_file
def test_derivatives_live_in_oracles(path: Path):
    if name_of(path) == "oracles" and path.stem in DERIVATIVE_CODE:
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("jax", name) for name in DERIVATIVES}, (
                f"{path}:{node.lineno} jax.{node.attr}"
            )
    taken = {name for name in imports(path) if name in {f"jax.{d}" for d in DERIVATIVES}}
    assert not taken


@pytest.mark.parametrize(
    "path",
    [
        p
        for folder in ("bilevel_flax", "examples", "configs")
        for p in (ROOT / folder).rglob("*.py")
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_unpickles(path: Path):
    assert not {name.split(".")[0] for name in imports(path)} & PICKLERS
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


def test_a_violation_is_found(tmp_path: Path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import bilevel_flax.train\nfrom bilevel_flax import cli, data\nimport pickle\n"
    )
    assert own_imports(wrong) == {"train", "cli", "data"}
    assert "pickle" in set(imports(wrong))
