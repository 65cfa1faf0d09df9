"""Calls that a config describes: `{"call": "optax:sgd", "learning_rate": 0.1}`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import ml_collections

from bilevel_flax import checks
from bilevel_flax.distribution import extras
from bilevel_flax.train.errors import ConfigError, nearest

CALL = "call"


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
        new_names = getattr(function, "old_arguments", {})
        any_name = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        unknown = [key for key in values if key not in {*accepted, *new_names} and not any_name]
        if unknown:
            near = nearest(unknown[0], list(accepted))
            raise ConfigError(f"{node[CALL]} takes no argument {unknown[0]!r}{near}")
        values = {k: v for k, v in provided.items() if k in accepted} | values
        try:
            signature.bind(**{new_names.get(k, k): v for k, v in values.items()})
            if "learning_rate" in values:  # Optax takes a negative one, and goes uphill
                checks.learning_rate("learning_rate", values["learning_rate"])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{node[CALL]}: {error}") from error
        return function(**values)
    return list(node) if isinstance(node, tuple | list) else node
