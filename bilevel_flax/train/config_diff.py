"""Which settings of a saved run differ from the current ones."""

import fnmatch
import json
from collections.abc import Iterable, Mapping
from typing import Any

_ABSENT = object()


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], harmless: Iterable[str] = ()
) -> list[str]:
    """Lists the settings that differ between two nested configs.

    Both are compared as JSON would give them back, so a tuple equals the list it was saved as; 1
    equals 1.0, but not True.

    Args:
        saved: the config a run was started with.
        current: the config it is to be continued with.
        harmless: patterns (`log_every`, `checkpoint.*`) of dotted keys that may differ; `*` stands
            for anything, dots included.

    Returns:
        One line for each difference, such as `inner.lr: saved 0.1, now 0.2`, sorted by key.

    Example:
        >>> config_differences({"inner": {"lr": 0.1}, "keep": 3}, {"inner": {"lr": 0.2}}, ["keep"])
        ['inner.lr: saved 0.1, now 0.2']
    """
    before, now = flatten(saved), flatten(current)
    patterns = list(harmless)
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if _same(old, new) or any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
            continue
        lines.append(f"{key}: saved {_show(old)}, now {_show(new)}")
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


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)
