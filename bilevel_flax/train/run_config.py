"""Every key of a run: its default, what it means, and whether a run may go on with another value.

A config is read here and nowhere else. Its other keys belong to the task, which reads them itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from bilevel_flax.train.config_key import Key, checked, key_field
from bilevel_flax.train.errors import ConfigError, nearest

# An `ml_collections.ConfigDict`. Its attributes are dynamic, so a type checker is told nothing.
Config = Any

REDUCTIONS = ("shard_map", "gspmd")
# Old key -> new key, and what an old value is now.
_RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "collectives": ("reduction", lambda old: {"floor": "shard_map", "xla": "gspmd"}.get(old, old)),
    # A share of the run's cost; what is left of it is whether anything is measured.
    "health.share": ("health.every", lambda old: 0 if str(old).strip("0.") == "" else None),
}
# Where a machine keeps its files; the tasks' own keys, and no part of what a run is.
_PATHS = ("data.manual_dir", "data.data_dir")
_TYPO = 0.8  # similarity from which an unknown key is taken for a slip of the pen


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = key_field(1000, "steps between two checkpoints", resume_safe=True, at_least=1)
    keep: int = key_field(3, "how many checkpoints are kept", resume_safe=True, at_least=1)
    required: bool = key_field(
        True, "end the run where its first checkpoint cannot be written", resume_safe=True
    )


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """What is measured of a run's health (docs/health.md)."""

    every: int | None = key_field(
        None, "steps between two measurements; 0: none", int, resume_safe=True, at_least=0
    )
    summary: bool = key_field(True, "compare D_x with a reference at the end", resume_safe=True)


@dataclasses.dataclass(frozen=True)
class ProblemConfig:
    """How the losses are computed; what they are is the task's (docs/large.md)."""

    remat: bool = key_field(
        False, "recompute G's forward pass in the backward one", resume_safe=True
    )
    microbatches: int = key_field(1, "equal parts of a minibatch, one after the other", at_least=1)
    compute_dtype: str | None = key_field(None, '"bfloat16" beside float32 parameters', str)
    derivatives: str | None = key_field(None, "how second derivatives are taken", str)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run: what to solve, how, and for how long.

    Example:
        >>> RunConfig(steps=10).checkpoint.keep
        3
        >>> KEYS["log_every"].resume_safe
        True
    """

    task: Any = key_field(None, '{"call": "module:function"}, which returns the Task', dict)
    solver: Any = key_field(
        None, '{"call": "module:function", ...}, which returns the solver', dict
    )
    name: str = key_field("", "of the run, for its reader", resume_safe=True)
    seed: int = key_field(0, "of initial values, order of minibatches, rng keys", at_least=0)
    steps: int = key_field(None, "updates; None: as many as `epochs` asks for", int, at_least=1)
    epochs: float | None = key_field(None, "passes over the inner data, where steps is None", float)
    log_every: int = key_field(
        100, "steps between two lines of metrics.jsonl", resume_safe=True, at_least=1
    )
    eval_every: int = key_field(200, "steps between two evaluations", at_least=1)
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    problem: ProblemConfig = ProblemConfig()
    on_device: bool | None = key_field(
        None, "keep all data on the device; None: where they fit", bool, resume_safe=True
    )
    mesh: str | None = key_field(
        None, '"data=2,fsdp=4" (docs/sharding.md); None: one device', str, resume_safe=True
    )
    rules: Any = key_field(
        None, "which axes of z are cut; None: the task's", tuple, resume_safe=True
    )
    reduction: str | None = key_field(
        None,
        '"shard_map": one a step; "gspmd": XLA\'s; None: as the losses allow',
        str,
        resume_safe=True,
        choices=REDUCTIONS,
    )
    report: str | None = key_field(
        None, '"module:function" that gives sections of report.html', str, resume_safe=True
    )
    distributed: Any = key_field(
        None,
        "how processes meet (docs/multi_host.md)",
        object,
        resume_safe=True,
        per_process=True,
    )
    # Not keys: the config itself, which task and solver read, and its plain form for config.json.
    source: Config = dataclasses.field(default=None, repr=False, compare=False)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, config: Config) -> RunConfig:
        """Reads a config, which gets the defaults of the keys that it does not state.

        Raises:
            ConfigError: a key that is unknown or missing, or a value of another kind.
        """
        if isinstance(config, cls):
            return config
        complete(config)
        values: dict[str, Any] = {}
        for name, key in KEYS.items():
            values[name] = checked(name, key, _at(config, name))
        for name in ("task", "solver"):
            if not isinstance(values[name], Mapping | ml_collections.ConfigDict):
                raise ConfigError(
                    f"config.{name} is missing: write config.{name} = "
                    '{"call": "module:function"} (docs/loops.md)'
                )
        if values["steps"] is None and values["epochs"] is None:
            raise ConfigError("--config.steps: say how many, or set --config.epochs")
        for group in GROUPS:
            of_group = {n: v for n, v in values.items() if n.startswith(f"{group}.")}
            values[group] = GROUPS[group](
                **{name.partition(".")[2]: values.pop(name) for name in of_group}
            )
        return cls(source=config, record=plain(config), **values)

    def with_steps(self, inner_batches: int) -> RunConfig:
        """The same with `steps` as a number, in the source too; `epochs` passes where it is None.

        Args:
            inner_batches: minibatches of the inner data.
        """
        if self.steps is not None:
            return self
        steps = max(1, round((self.epochs or 1.0) * inner_batches))
        with self.source.unlocked():
            self.source.steps = steps
        return dataclasses.replace(self, steps=steps)


GROUPS: dict[str, type] = {
    "checkpoint": CheckpointConfig,
    "health": HealthConfig,
    "problem": ProblemConfig,
}


def _keys_of(schema: type, prefix: str = "") -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for field in dataclasses.fields(schema):
        if field.name in GROUPS and not prefix:
            keys |= _keys_of(GROUPS[field.name], f"{field.name}.")
        elif "key" in field.metadata:
            keys[f"{prefix}{field.name}"] = field.metadata["key"]
    return keys


KEYS: dict[str, Key] = _keys_of(RunConfig)
# Patterns of dotted keys, for `config_differences`; those that earlier versions had among them.
RESUME_SAFE = (
    *(name for name, key in KEYS.items() if key.resume_safe and key.kind is not object),
    "distributed*",
    "health.*",
    *(old for old, (new, _) in _RENAMED.items() if KEYS[new].resume_safe),
    *_PATHS,
)
PER_PROCESS = (*(name for name, key in KEYS.items() if key.per_process), *_PATHS)


def complete(config: Config) -> None:
    """Adds the defaults that a config does not state, and renames what is of the old layout.

    Raises:
        ConfigError: a key that looks like a slip of the pen, or an unknown one in a group.
    """
    with config.unlocked():
        for old in _RENAMED:
            _rename(config, old)
        _check_names(config)
        for name, key in KEYS.items():
            group, _, last = name.rpartition(".")
            if group and config.get(group) is None:
                config[group] = ml_collections.ConfigDict()
            node = config[group] if group else config
            if last in node or key.kind in (dict, object):
                continue
            with node.unlocked():
                placeholder = config_dict.placeholder(key.kind)
                node[last] = placeholder if key.default is None else key.default


def renamed(name: str, value: Any) -> tuple[str, Any]:
    """A key of today and its value, from those of the old layout or of today."""
    if name not in _RENAMED:
        return name, value
    new, convert = _RENAMED[name]
    if value is not None:
        warnings.warn(
            f"config.{name}={value!r} is now config.{new}={convert(value)!r}; the old name goes in "
            "0.3",
            DeprecationWarning,
            stacklevel=2,
        )
    return new, convert(value)


def _rename(config: Config, old: str) -> None:
    group, _, last = old.rpartition(".")
    node = config.get(group) if group else config
    if not isinstance(node, ml_collections.ConfigDict) or last not in node:
        return
    new, value = renamed(old, node[last])
    with node.unlocked():
        del node[last]
        last = new.rpartition(".")[2]
        if value is not None and node.get(last) is None:
            node[last] = config_dict.placeholder(KEYS[new].kind)
            node[last] = value


def _check_names(config: Config) -> None:
    top = [name for name in KEYS if "." not in name] + list(GROUPS)
    for name in config:
        close = [] if name in top else difflib.get_close_matches(name, top, n=1, cutoff=_TYPO)
        # Where the config has the right one as well, this one is the task's.
        if close and close[0] not in config:
            raise ConfigError(f'config.{name}: there is no such key (did you mean "{close[0]}"?)')
    for group in GROUPS:
        node = config.get(group)
        if node is None:
            continue
        if not isinstance(node, Mapping | ml_collections.ConfigDict):
            raise ConfigError(f"config.{group}={node!r}: write a dict")
        known = [name.partition(".")[2] for name in KEYS if name.startswith(f"{group}.")]
        for name in node:
            if name not in known:
                raise ConfigError(
                    f"--config.{group}.{name}: unknown, choose among {', '.join(known)}"
                    f"{nearest(name, known)}"
                )


def _at(config: Config, name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = None if node is None else node.get(part)
    return node


def plain(config: Config) -> dict[str, Any]:
    """The config as JSON would store it: dicts, lists, strings, numbers, None."""
    return json.loads(json.dumps(config.to_dict()))


def completed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was saved, by this version or an earlier one, with what it left out."""
    config = ml_collections.ConfigDict(dict(record))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        complete(config)
    return plain(config)


def table() -> str:
    """The keys as a table in Markdown, as docs/loops.md has it."""
    lines = ["| key | default | | may change on resuming |", "|---|---|---|---|"]
    for name, key in KEYS.items():
        default = "" if name in ("task", "solver") else f"`{key.default!r}`"
        lines.append(f"| `{name}` | {default} | {key.doc} | {'yes' if key.resume_safe else ''} |")
    return "\n".join(lines)
