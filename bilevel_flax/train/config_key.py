"""A key of a config: what is known of it, and whether a value is one of its."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

from bilevel_flax.checks import check_count
from bilevel_flax.train.errors import ConfigError, check_choice

_MOST = 2**31 - 1  # steps count in int32
_MOST_SEED = 2**32 - 1  # JAX drops what is above: two seeds would be one run


class Key(NamedTuple):
    """What is known of a key of the config.

    Attributes:
        default: where the config is silent; None: decided when the run starts.
        doc: what it means.
        kind: of its values.
        resume_safe: a run may be continued with another value: it changes none of its numbers.
        per_process: may differ between the processes of one run.
        at_least: the least value, of integers.
        choices: the only values beside None; (): any.
    """

    default: Any
    doc: str
    kind: type
    resume_safe: bool = False
    per_process: bool = False
    at_least: int | None = None
    choices: tuple[str, ...] = ()


def key_field(default: Any, doc: str, kind: type | None = None, **more: Any) -> Any:
    """A field of a config's schema: its default, one line about it, and the rest of a `Key`."""
    key = Key(default, doc, kind or type(default), **more)
    return dataclasses.field(default=default, metadata={"key": key})


def checked(name: str, key: Key, value: Any) -> Any:
    """The value as the run uses it.

    Raises:
        ConfigError: it is of another kind, or out of range.
    """
    if value is None or key.kind in (dict, object):
        if value is None and key.default is not None:
            raise ConfigError(f"--config.{name}=None: expected {key.kind.__name__}")
        return value
    if key.at_least is not None:
        check_count(f"--config.{name}", value, key.at_least)
        most = _MOST if key.at_least else _MOST_SEED
        if value > most:
            raise ConfigError(f"--config.{name}={value}: must be at most {most}")
        return int(value)
    if key.kind is float and isinstance(value, numbers.Real):
        if not 0 < float(value) < math.inf:
            raise ConfigError(f"--config.{name}={value}: must be above 0")
        return float(value)
    if key.kind is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, key.kind):
        raise ConfigError(f"--config.{name}={value!r}: expected {key.kind.__name__}")
    if key.choices:
        check_choice(f"--config.{name}={value}", value, (*key.choices, "None"))
    return value
