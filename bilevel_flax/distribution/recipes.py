"""`bilevel-flax new`: a config and the example that it names, copied into a folder to be edited."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

from bilevel_flax.distribution import shipped

_PACKAGE = Path("examples", "__init__.py")
_EXAMPLE = re.compile(r"\bexamples\.(\w+)")
_COMMAND = re.compile(r"bilevel-flax train --config \S+ --workdir \S+")


class RecipeError(ValueError):
    """A mistake in the command; the message is one line."""


def names() -> list[str]:
    """The recipes that there are: the names of the config files."""
    return sorted(path.stem for path in (shipped.root() / "configs").glob("*.py"))


def table() -> str:
    """One line a recipe: its name, and the first line of its config's docstring."""
    width = max(map(len, names()))
    lines = []
    for name in names():
        summary = _docstring(name).partition("\n")[0]
        lines.append(f"{name:{width}s}  {summary}")
    return "\n".join(lines)


def command(name: str) -> str:
    """The first command of a config's docstring: what to type on the machine that is there."""
    return _COMMAND.findall(_docstring(name))[0]


def _docstring(name: str) -> str:
    source = (shipped.root() / _config(name)).read_text("utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def files(name: str) -> list[Path]:
    """What a recipe consists of, relative to the folder that it is copied into.

    Raises:
        RecipeError: no such recipe; the nearest is named.
    """
    known = names()
    if name not in known:
        close = [other for other in known if other.startswith(Path(name).stem)]
        close = close or difflib.get_close_matches(Path(name).stem, known, n=1, cutoff=0.4)
        near = f' (did you mean "{close[0]}"?)' if close else ""
        raise RecipeError(f"no recipe {name!r}: choose one of {', '.join(known)}{near}")
    files, waiting = [_config(name), _PACKAGE], _examples_named_in(_config(name))
    while waiting:
        folder = waiting.pop(0)
        if any(path.is_relative_to(folder) for path in files):
            continue
        parts = [
            path.relative_to(shipped.root())
            for path in sorted((shipped.root() / folder).rglob("*"))
            if path.is_file() and path.suffix != ".pyc" and not path.stem.endswith("_test")
        ]
        files += parts
        for part in parts:
            waiting += _examples_named_in(part) if part.suffix == ".py" else []
    return files


def copy(name: str, folder: Path) -> list[Path]:
    """Copies a recipe; all of it, or nothing.

    Args:
        name: as `names` gives it.
        folder: made if it is not there. Files that are there already and equal are left alone.

    Returns:
        The files that were written, relative to `folder`.

    Raises:
        RecipeError: no such recipe, a file is in the way, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is no folder: give one to copy {name} into")
    new = []
    for path in files(name):
        target = folder / path
        if not target.exists():
            new.append(path)
        elif target.read_bytes() != (shipped.root() / path).read_bytes():
            raise RecipeError(
                f"{target} is there and differs from the recipe's: move it away, or choose another "
                f"folder: bilevel-flax new {name} DIR"
            )
    try:
        for path in new:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes((shipped.root() / path).read_bytes())
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written: {error}") from error
    return new


def _config(name: str) -> Path:
    return Path("configs", f"{name}.py")


def _examples_named_in(path: Path) -> list[Path]:
    """Folders of the examples that a file imports or names as a callable."""
    source = (shipped.root() / path).read_text("utf-8")
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "examples":
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= set(_EXAMPLE.findall(node.module))
        elif isinstance(node, ast.Import):
            named |= {name for alias in node.names for name in _EXAMPLE.findall(alias.name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named |= set(_EXAMPLE.findall(node.value))
    folders = [Path("examples", name) for name in sorted(named)]
    return [folder for folder in folders if (shipped.root() / folder).is_dir()]
