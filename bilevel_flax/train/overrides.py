"""What the command line changes in a config: `--config.key.subkey=value`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any

import ml_collections

from bilevel_flax.train import run_config
from bilevel_flax.train.calls import CALL, imported
from bilevel_flax.train.errors import ConfigError, nearest
from bilevel_flax.train.run_config import Config


class OpenMapping(ml_collections.ConfigDict):
    """Names of the user's own, each with a text: overrides may add keys to it.

        config.domains = OpenMapping()        --config.domains.NAME=path

    "none" takes a name that the config brought along out again.

    Example:
        >>> from bilevel_flax.train.config import OpenMapping
        >>> domains = OpenMapping({"code": "code.txt"})
        >>> domains.code
        'code.txt'
    """


def keys(config: Config, prefix: str = "") -> list[str]:
    """All leaf keys of nested dicts, joined by dots."""
    names = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_node = isinstance(value, Mapping | ml_collections.ConfigDict)
        names += keys(value, f"{name}.") if is_node else [name]
    return names


def apply_override(config: Config, override: str) -> None:
    """Sets the key of `key.subkey=value`, read as the type that the key has.

    Raises:
        ConfigError: an unknown key (the nearest is named), or a value of another type.
    """
    name, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--config.{override}: write --config.{name}=VALUE")
    name, value = run_config.renamed(name, text)
    text = str(value)
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
        nodes = sorted({key.rpartition(".")[0] for key in known} - {""})
        near = nearest(name, [*known, *options]) or nearest(name, nodes)
        raise ConfigError(f"--config.{name}: the config has no such key{near}")
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
    options = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            options |= _options(value, f"{prefix}{key}.")
    if CALL in config:
        function = imported(config[CALL])
        parameters = inspect.signature(function).parameters
        names = dict(zip(parameters, parameters, strict=True)) | getattr(
            function, "old_arguments", {}
        )
        for name, now in names.items():
            default = parameters[now].default
            if name not in config and default is not inspect.Parameter.empty:
                options[f"{prefix}{name}"] = default
    return options


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
