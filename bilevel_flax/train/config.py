"""Configs: one Python file a task, overridden from the command line, resolved to real callables.

A config file defines `get_config(arg) -> ml_collections.ConfigDict`. A nested dict with the key
"call" stands for a call of what it names, with the other keys as its arguments:

    config.solver.inner = {"call": "optax:sgd", "learning_rate": 0.1}
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from bilevel_flax.distribution import extras, recipes
from bilevel_flax.train import run_config
from bilevel_flax.train.calls import CALL, imported, resolve
from bilevel_flax.train.errors import ConfigError, check_choice, nearest
from bilevel_flax.train.overrides import OpenMapping, apply_override, keys
from bilevel_flax.train.run_config import Config, plain

__all__ = [
    "CALL",
    "Config",
    "ConfigError",
    "OpenMapping",
    "check_choice",
    "config_differences",
    "flatten",
    "imported",
    "keys",
    "load",
    "naming_missing_keys",
    "nearest",
    "plain",
    "refusing_unread_slips",
    "resolve",
]


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies overrides.

    Args:
        spec: `path/to/config.py` or `path/to/config.py:argument` (given to `get_config`). The
            folder above the file's is put on the import path, so that the config can name
            `examples...` beside it.
        overrides: `key.subkey=value`, in order. Beside the config's own keys and those of
            `RunConfig`, a call's further arguments can be set (`solver.inner.momentum=0.9`), as
            far as they have a default.

    Returns:
        The config, with the defaults of what it does not state; keys can no longer be added.

    Raises:
        ConfigError: no such file, no `get_config`, an unknown key (the nearest is named), a value
            of the wrong type.
    """
    name, _, argument = spec.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        folders = (path.parent, Path("configs"))
        beside = {other.stem: other for folder in folders for other in sorted(folder.glob("*.py"))}
        close = difflib.get_close_matches(path.stem, list(beside), n=1)
        near = f' (did you mean "{beside[close[0]]}"?)' if close else ""
        if path.stem in recipes.names() and path.stem not in beside:
            near = f": bilevel-flax new {path.stem} copies it and its example into this folder"
        raise ConfigError(f"--config={spec}: no file {path}{near}")
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"--config={spec}: {path} is no Python file; a config is one, FILE.py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise ConfigError(f"--config={spec}: {where} is no Python: {error.msg}") from error
    except ModuleNotFoundError as error:
        if extras.explain(error):
            raise
        raise ConfigError(
            f"--config={spec}: it imports {error.name}, which is not there: install it, or give "
            "the command in the folder that it lies in"
        ) from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {path} defines no get_config()")
    takes = inspect.signature(module.get_config)
    if argument and not takes.parameters:
        raise ConfigError(f"--config={spec}: {path} takes no argument, leave out :{argument}")
    given = (argument,) if argument else ()
    try:
        takes.bind(*given)
    except TypeError as error:
        raise ConfigError(
            f"--config={spec}: get_config{takes} is called with "
            f"{repr(argument) if argument else 'nothing'} ({error}): give its one argument as "
            f"--config={name}:ARGUMENT, and every other a default"
        ) from error
    config = module.get_config(*given)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"--config={spec}: get_config() returned a {type(config).__name__}, not an "
            "ml_collections.ConfigDict"
        )
    run_config.complete(config)
    config.lock()
    for override in overrides:
        apply_override(config, override)
    return config


class _Recorded(ml_collections.ConfigDict):
    """Notes which keys are asked for."""

    def __getitem__(self, key: str) -> Any:
        self.__dict__.setdefault("_asked", set()).add(key)
        return super().__getitem__(key)


@contextlib.contextmanager
def refusing_unread_slips(config: Config) -> Iterator[None]:
    """Finds the keys of the task's own that are misspelt in its file.

    Raises:
        ConfigError: inside the block nobody asked for a key, but for one that is spelt almost so.
    """
    nodes = {"": config}
    for name, node in config.items():
        if type(node) is ml_collections.ConfigDict and name not in ("task", "solver"):
            nodes[f"{name}."] = node
    for node in nodes.values():
        object.__setattr__(node, "__class__", _Recorded)
    try:
        yield
    finally:
        for node in nodes.values():
            object.__setattr__(node, "__class__", ml_collections.ConfigDict)
        asked = {prefix: node.__dict__.pop("_asked", set()) for prefix, node in nodes.items()}
    for prefix, node in nodes.items():
        for name in node:
            if name not in asked[prefix] and f"{prefix}{name}" not in run_config.KEYS:
                close = difflib.get_close_matches(name, asked[prefix], n=1, cutoff=0.8)
                if close:
                    raise ConfigError(
                        f"config.{prefix}{name}: nothing reads it (did you mean "
                        f'"{prefix}{close[0]}"?)'
                    )


@contextlib.contextmanager
def naming_missing_keys(config: Config) -> Iterator[None]:
    """Turns the look-up of a key that a config does not have into one line.

    Raises:
        ConfigError: inside the block such a key was asked for; the nearest that there is is named.
    """
    try:
        yield
    except (AttributeError, KeyError) as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        module = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
        if not module.startswith("ml_collections"):
            raise
        cause: Any = error
        while isinstance(cause, BaseException):  # AttributeError(KeyError("'name' ..."))
            cause = cause.args[0]
        name = (re.findall(r"'(\w+)'", str(cause)) or [str(cause)])[0]
        known = [key.rpartition(".")[2] for key in keys(config)]
        raise ConfigError(
            f"the config has no key {name!r}, which the task reads{nearest(name, known)}: add it"
        ) from error


_ABSENT = object()


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], resume_safe: Iterable[str] = ()
) -> list[str]:
    """Lists the settings that differ between two nested configs.

    Both are compared as JSON would give them back, so a tuple equals the list it was saved as; 1
    equals 1.0, but not True.

    Args:
        saved: the config a run was started with.
        current: the config it is to be continued with.
        resume_safe: patterns (`log_every`, `checkpoint.*`) of dotted keys that may differ; `*`
            stands for anything, dots included.

    Returns:
        One line for each difference, such as `inner.lr: saved 0.1, now 0.2`, sorted by key.

    Example:
        >>> config_differences({"inner": {"lr": 0.1}, "keep": 3}, {"inner": {"lr": 0.2}}, ["keep"])
        ['inner.lr: saved 0.1, now 0.2']
    """
    before, now = flatten(saved), flatten(current)
    patterns = list(resume_safe)
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if _same(old, new) or any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
            continue
        lines.append(f"{key}: saved {_shown(old)}, now {_shown(new)}")
    return lines


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a nested config by dotted key, as JSON would give them back."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else key, value)
        elif prefix:
            flat[prefix] = node

    visit("", json.loads(json.dumps(dict(config), default=str)))
    return flat


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, bool) or isinstance(new, bool):
        return old is new
    return old == new or (old != old and new != new)


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)
