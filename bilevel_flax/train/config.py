"""Configs: one Python file a task, overridden from the command line, resolved to real callables.

A config file defines `get_config(arg) -> ml_collections.ConfigDict`. A nested dict with the key
"call" stands for a call of what it names, with the other keys as its arguments:

    config.solver.inner = {"call": "optax:sgd", "learning_rate": 0.1}
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from bilevel_flax.checks import UserError
from bilevel_flax.distribution import extras, recipes

CALL = "call"


class OpenMapping(ml_collections.ConfigDict):
    """Names of the user's own, each with a text: overrides may add keys to it.

        config.domains = OpenMapping()        --config.domains.NAME=path

    "none" takes a name that the config brought along out again.
    """


# An `ml_collections.ConfigDict`. Its attributes are dynamic, so a type checker is told nothing.
Config = Any


class ConfigError(UserError):
    """A mistake in a config or an override; the message is one line that says how to mend it."""


def nearest(name: str, known: Sequence[str]) -> str:
    """' (did you mean "x"?)', or '' when nothing is near."""
    # A mistyped last part is the usual case, so it is compared on its own as well.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        tails = {key.rsplit(".", 1)[-1]: key for key in known}
        near = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.5)
        close = [tails[tail] for tail in near]
    return f' (did you mean "{close[0]}"?)' if close else ""


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies overrides.

    Args:
        spec: `path/to/config.py` or `path/to/config.py:argument` (given to `get_config`). The
            folder above the file's is put on the import path, so that the config can name
            `examples...` beside it.
        overrides: `key.subkey=value`, in order. Beside the config's own keys, a call's further
            arguments can be set (`solver.inner.momentum=0.9`), as far as they have a default.

    Returns:
        The config; keys can no longer be added.

    Raises:
        ConfigError: no such file, no `get_config`, an unknown key (the nearest is named), a value
            of the wrong type.
    """
    name, _, argument = spec.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        near = nearest(str(path), beside)
        if path.stem in recipes.names():
            near = f": bilevel-flax new {path.stem} copies it and its example into this folder"
        raise ConfigError(f"--config={spec}: no file {path}{near}")
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={spec}: {path} defines no get_config()")
    if argument and not inspect.signature(module.get_config).parameters:
        raise ConfigError(f"--config={spec}: {path} takes no argument, leave out :{argument}")
    config = module.get_config(argument) if argument else module.get_config()
    config.lock()
    for override in overrides:
        _override(config, override)
    return config


def keys(config: Config, prefix: str = "") -> list[str]:
    """All leaf keys of nested dicts, joined by dots."""
    found = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += (
            keys(value, f"{name}.")
            if isinstance(value, Mapping | ml_collections.ConfigDict)
            else [name]
        )
    return found


def _override(config: Config, override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--config.{override}: write --config.{name}=VALUE")
    parent, _, last = name.rpartition(".")
    mapping = _node(config, parent)
    if isinstance(mapping, OpenMapping):
        _set(mapping, name, last, text)
        return
    known = keys(config)
    inside = [key for key in known if key.startswith(name + ".")]
    if inside:
        raise ConfigError(f"--config.{name}: it has several keys, set one: {', '.join(inside)}")
    options = {} if name in known else _options(config)
    if name not in known and name not in options:
        raise ConfigError(
            f"--config.{name}: the config has no such key{nearest(name, [*known, *options])}"
        )
    *path, last = name.split(".")
    node = config
    for part in path:
        node = node[part]
    now = options[name] if name in options else node[last]
    expected = node.get_type(last) if name in known else type(now)
    try:
        value = _parse(text, now, expected)
    except (ValueError, SyntaxError) as error:
        example = "" if now is None else f", such as {now!r}"
        raise ConfigError(
            f"--config.{name}={text}: expected {expected.__name__}{example}"
        ) from error
    with node.unlocked():
        node[last] = value


def _node(config: Config, name: str) -> Any:
    """The dict at a dotted name, or None."""
    for part in name.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or part not in config:
            return None
        config = config[part]
    return config


def _set(mapping: OpenMapping, name: str, last: str, text: str) -> None:
    if not last or not text:
        raise ConfigError(
            f"--config.{name}={text}: write --config.{name.rpartition('.')[0]}.NAME=VALUE"
        )
    with mapping.unlocked():
        if text.lower() == "none":
            if last in mapping:
                del mapping[last]
        else:
            mapping[last] = text


def _options(config: Config, prefix: str = "") -> dict[str, Any]:
    """Arguments with a default that the config's calls take and that it does not mention."""
    found = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found |= _options(value, f"{prefix}{key}.")
    if CALL in config:
        for name, parameter in inspect.signature(imported(config[CALL])).parameters.items():
            if name not in config and parameter.default is not parameter.empty:
                found[f"{prefix}{name}"] = parameter.default
    return found


def _parse(text: str, now: Any, expected: type) -> Any:
    """The value that `text` stands for; None only where there is none now."""
    if now is None and text == "None":
        return None
    if expected is bool:
        if text.lower() not in ("true", "1", "false", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if expected in (int, float, str):
        return expected(text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if expected is type(None):
        return value
    if expected in (tuple, list):
        return expected(value) if isinstance(value, tuple | list) else expected([value])
    if not isinstance(value, expected):
        raise ValueError(text)
    return value


def plain(config: Config) -> dict[str, Any]:
    """The config as JSON would store it: dicts, lists, strings, numbers, None."""
    return json.loads(json.dumps(config.to_dict()))


def imported(name: str) -> Any:
    """What `package.module:attribute` names.

    Raises:
        ConfigError: it cannot be imported, or the module has no such attribute.
        ModuleNotFoundError: it needs an extra that is not installed.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f'"{name}": write "package.module:attribute"')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if extras.explain(error):
            raise
        raise ConfigError(
            f'"{name}": {error}; give the command in the folder that holds it, or put that folder '
            "on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            f'"{name}": {module_name} has no {attribute!r}{nearest(attribute, dir(module))}'
        )
    return getattr(module, attribute)


def resolve(node: Any, **provided: Any) -> Any:
    """Makes the calls that a config describes, from the inside out.

    Args:
        node: a config, a nested dict, or a leaf (returned as it is).
        **provided: further arguments for the outermost call; those that its signature does not
            have are left out.

    Raises:
        ConfigError: a name that cannot be imported, or arguments that the callable refuses.
    """
    if isinstance(node, Mapping | ml_collections.ConfigDict):
        values = {key: resolve(value) for key, value in node.items() if key != CALL}
        if CALL not in node:
            return values
        function = imported(str(node[CALL]))
        if not callable(function):
            raise ConfigError(f'"{node[CALL]}" cannot be called: it is {function!r:.60}')
        signature = inspect.signature(function)
        accepted = signature.parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        unknown = [key for key in values if key not in accepted and not any_name]
        if unknown:
            near = nearest(unknown[0], list(accepted))
            raise ConfigError(f"{node[CALL]} takes no argument {unknown[0]!r}{near}")
        values = {k: v for k, v in provided.items() if k in accepted} | values
        try:
            signature.bind(**values)
        except TypeError as error:
            raise ConfigError(f"{node[CALL]}: {error}") from error
        return function(**values)
    return list(node) if isinstance(node, tuple | list) else node
