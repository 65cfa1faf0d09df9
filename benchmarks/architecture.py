"""What a reader and an installer meet: the way of a step, records, modules, lines, dependencies.

    python benchmarks/architecture.py

A minute of one core, most of it for the imports, which are timed in turn in fresh processes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import statistics
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rows import Rows, add_argument

import bilevel_flax as bf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bilevel_flax"
IMPORT = """
import time
began = time.process_time()
import flax, optax
stack = time.process_time()
import bilevel_flax
print((time.process_time() - began) / (stack - began))
"""


def way() -> list[tuple[str, str]]:
    """(file, function) of our frames from `solver.update` to `jax.jvp`, for SOBA."""
    frames, derive = [], jax.jvp

    def recorded(*args, **kwargs):
        stack = traceback.extract_stack()[:-1]
        frames.extend((f.filename, f.name) for f in stack if f.filename.startswith(str(PACKAGE)))
        return derive(*args, **kwargs)

    jax.jvp = recorded
    try:
        loss = lambda z, x, batch: jnp.sum((z - x * batch) ** 2)
        solver = bf.soba(bf.Problem(loss, loss), inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        start = solver.init(jnp.ones(2), jnp.ones(()))
        jax.eval_shape(solver.update, start, bf.Batch(jnp.ones(2), jnp.ones(2)))
    finally:
        jax.jvp = derive
    return frames


def lines(path: Path) -> dict[str, int]:
    """A file's lines by kind."""
    text = path.read_text(encoding="utf-8")
    kinds = dict.fromkeys(range(1, len(text.splitlines()) + 1), "code")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            kinds[number] = "blank and comment"

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kinds |= dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), "import")
        elif (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            doc = node.body[0]
            kinds |= dict.fromkeys(range(doc.lineno, (doc.end_lineno or 0) + 1), "docstring")
    return {kind: list(kinds.values()).count(kind) for kind in KINDS}


KINDS = ("code", "docstring", "import", "blank and comment")


def import_ratio(times: int) -> list[float]:
    """CPU time of `import flax, optax, bilevel_flax` over that of the first two."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT]
    return [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(times)
    ]


def main(as_table: bool) -> None:
    """Prints the table."""
    frames = way()
    files = sorted({file for file, _ in frames})
    every = sorted(PACKAGE.rglob("*.py"))
    counts = {kind: sum(lines(path)[kind] for path in every) for kind in KINDS}
    long = [path for path in every if len(path.read_text().splitlines()) > 300]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ratios = import_ratio(5)
    fields = (
        len(dataclasses.fields(bf.Problem)),
        len(bf.Estimator._fields),
        len(bf.BilevelSolver._fields),
    )
    way_lines = sum(len(Path(file).read_text().splitlines()) for file in files)
    rows = {
        "frames, files, lines from update to jvp": f"{len(frames)}, {len(files)}, {way_lines}",
        "fields of Problem, Estimator, BilevelSolver": ", ".join(map(str, fields)),
        "modules at the root": f"{len([*PACKAGE.glob('*.py')])}",
        "lines of the package": f"{sum(counts.values())} in {len(every)} files",
        "of them": ", ".join(f"{count} {kind}" for kind, count in counts.items()),
        "files over 300 lines": ", ".join(str(p.relative_to(PACKAGE)) for p in long) or "none",
        "hard dependencies": ", ".join(project["dependencies"]),
        "import over flax and optax": f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f}, {len(ratios)} processes)",
    }
    with Rows(as_table) as table:
        for name, value in rows.items():
            table.add({"measured": name, "value": value})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a reader and an installer meet.")
    add_argument(parser)
    main(parser.parse_args().markdown)
