"""The imports flow one way, derivatives have one home, and nothing unpickles."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

import bilevel_flax as bf

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bilevel_flax"

# Lowest first; a file may import its own room and those below, never one beside or above it.
LAYERS = (
    {"deprecated"},
    {"base", "distribution"},
    {"tree", "data"},
    {"minibatches"},
    {"per_sample"},
    {"oracles"},
    {"checks"},
    {"outer"},
    {"solvers"},
    {"diagnostics"},
    {"contrib", "nnx", "sharding", "checkpoints"},
    {"trainers", "recipes"},
    # The plugin ends here: nothing above is imported below.
    {"train"},
    {"bench", "plan"},
    {"cli"},
)
# The plugin's only dependencies; `checkpoints` may import orbax when it is used.
CORE = {"jax", "jaxlib", "flax", "optax", "numpy"}
HEAVY = {
    "orbax",
    "ml_collections",
    "matplotlib",
    "tensorboardX",
    "tqdm",
    "PIL",
    "sklearn",
    "grain",
    "tensorflow_datasets",
}
HARNESS = {"train", "bench", "plan", "cli"}
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
DERIVATIVE_CODE = {
    "derivative_modes",
    "derivatives",
    "gradients",
    "kernel_rules",
    "kernels",
    "mixed_mode",
    "residual_codes",
    "stops",
    "symmetry",
}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

FILES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = [*FILES, *(p for d in ("examples", "configs") for p in (ROOT / d).rglob("*.py"))]


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
    return next(i for i, names in enumerate(LAYERS) if name in names)


def faults(check: Callable[[Path], Iterable[str]], paths: Sequence[Path] = FILES) -> dict:
    """What `check` finds in each file, those without a fault left out."""
    found = {str(path.relative_to(ROOT)): sorted(check(path)) for path in paths}
    return {path: names for path, names in found.items() if names}


def test_imports_lead_downwards():
    def upward(path: Path) -> set[str]:
        name = name_of(path)
        if name == "__init__":
            return own_imports(path) & HARNESS
        below = {other for names in LAYERS[: layer(name)] for other in names}
        return own_imports(path) - below - {name}

    assert not faults(upward)


def test_the_plugin_needs_jax_flax_optax_and_numpy():
    def foreign(path: Path) -> set[str]:
        if name_of(path) in HARNESS:
            return set()
        late = {"orbax", "etils"} if name_of(path) == "checkpoints" else set()
        if name_of(path) == "trainers":  # an adapter needs what it adapts to
            package = path.stem.split("_")[0]
            late = {package} | ({"haliax", "equinox"} if package == "levanter" else set())
        needed = {name.split(".")[0] for name in imports(path)}
        return needed - CORE - late - sys.stdlib_module_names - {"bilevel_flax"}

    assert not faults(foreign)


def test_the_import_loads_none_of_the_harness_and_takes_little_beside_flax_and_optax():
    code = """
import sys, time
began = time.process_time()
import flax, optax
stack = time.process_time()
import bilevel_flax
print((time.process_time() - began) / (stack - began), *sys.modules)
"""
    ratios = []
    while not ratios or (min(ratios) >= 1.15 and len(ratios) < 6):  # a busy machine takes longer
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        ratio, *modules = done.stdout.split()
        ratios.append(float(ratio))
        loaded = {name for name in modules if name in {"flax.nnx", "bilevel_flax.contrib"}}
        assert not loaded | {name.partition(".")[0] for name in modules} & HEAVY
    assert min(ratios) < 1.15


def test_what_is_imported_late_is_there():
    assert set(bf.__all__) == set(dir(bf))
    assert all(hasattr(bf, name) for name in bf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'sobaa'"):
        _ = bf.sobaa  # pyright: ignore[reportAttributeAccessIssue]


def test_the_loop_names_no_solver():
    solvers = {*bf.solvers.__all__, *bf.contrib.__all__} - {"auto"}  # a word of many uses
    for path in (PACKAGE / "train").rglob("*.py"):
        words = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
        constants = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant))
        words |= {node.value for node in constants if isinstance(node.value, str)}
        assert not words & solvers, path


def test_derivatives_live_in_oracles():
    def derivatives(path: Path) -> set[str]:
        if name_of(path) == "oracles" and path.stem in DERIVATIVE_CODE:
            return set()
        attributes = (
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        )
        return {*attributes, *imports(path)} & {f"jax.{name}" for name in DERIVATIVES}

    assert not faults(derivatives)


def test_nothing_unpickles():
    def unpickling(path: Path) -> set[str]:
        allowing = {
            f"line {node.value.lineno}: allow_pickle"
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        }
        return allowing | {name.split(".")[0] for name in imports(path)} & PICKLERS

    assert not faults(unpickling, SHIPPED)


def test_a_violation_is_found(tmp_path: Path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import bilevel_flax.train.experiment\nfrom bilevel_flax import cli, data\nimport pickle\n"
    )
    assert own_imports(wrong) == {"train", "cli", "data"}
    assert "pickle" in set(imports(wrong))
    here = {"tests/core/layers_test.py": ["pytest"]}
    assert faults(lambda path: {"pytest"} & set(imports(path)), [Path(__file__)]) == here


def test_the_cores_tests_need_no_extra():
    tools = {"pytest", "hypothesis", "mistakes", "problems", "transcriptions", "bilevel_flax"}
    for path in (ROOT / "tests" / "core").glob("*.py"):
        names = set(imports(path))
        assert {name.partition(".")[0] for name in names} <= CORE | tools | sys.stdlib_module_names
        assert (
            not {name.split(".")[1] for name in names if name.startswith("bilevel_flax.")} & HARNESS
        )
