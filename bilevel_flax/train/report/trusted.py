"""The function that makes a task's sections of a report, found without running a stranger's code.

The folder of a run may come from somebody else, and its `config.json` may name anything. Two kinds
of functions are called: `sections` of the examples that come with the package, and, where the user
says so, those of modules in the working directory. SECURITY.md says the same to users.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bilevel_flax.deprecated.modules import MODULES
from bilevel_flax.distribution import shipped
from bilevel_flax.train.report.sections import Section

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

SectionsFunction = Callable[[Path], Sequence[Section]]


class UntrustedError(ValueError):
    """A run's folder names code that is not trusted; none of it has run."""


def find_sections(name: Any, workdir: Path, *, trust: bool = False) -> SectionsFunction:
    """The function that a run's `config.json` names, if it may be called.

    Args:
        name: `module:function`, out of the run's folder.
        workdir: the run's folder; a file in it is never run.
        trust: also take modules of the working directory.

    Raises:
        UntrustedError: it may not be called, or is not there.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UntrustedError(f"{name!r:.80} is no module:function")
    module_name, _, attribute = name.partition(":")
    module_name = MODULES.get(module_name, module_name)  # of a run before it moved
    source = _source(module_name)
    # Before the import, which would run the module.
    if source is None or not _is_allowed(name, source, workdir.resolve(), trust):
        raise UntrustedError(
            f'"{name}" is not of the package, and a run\'s folder may come from anybody'
            + (
                "; --trust takes modules of the working directory, outside of the run's folder"
                if trust
                else "; if it is your own, give the command in its folder, with --trust"
            )
        )
    module = importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    # A name that the module only imported is somebody else's function, `rmtree` say.
    if not inspect.isfunction(function) or function.__module__ != module_name:
        raise UntrustedError(f'"{name}": {source} defines no function {attribute}()')
    return function


def _is_allowed(name: str, source: Path, workdir: Path, trust: bool) -> bool:
    if source.is_relative_to(workdir):
        return False
    if name.endswith(":sections") and source.is_relative_to(shipped.root().resolve() / "examples"):
        return True
    here = Path.cwd().resolve()
    # An environment that lies in the working directory is no code of the user's.
    environments = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    installed = "site-packages" in source.parts or any(
        place.is_relative_to(here) and source.is_relative_to(place) for place in environments
    )
    return trust and source.is_relative_to(here) and not installed


def _source(module_name: str) -> Path | None:
    """The file that a module would be imported from, found without importing its parents."""
    places: list[str] | None = None
    origin = None
    for depth in range(module_name.count(".") + 1):
        part = ".".join(module_name.split(".")[: depth + 1])
        spec = importlib.machinery.PathFinder.find_spec(part, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
        origin = spec.origin
    if origin is None or not origin.endswith(".py"):
        return None
    return Path(origin).resolve()
