"""The mixture that a run learned: its end point, and how it got there.

Only `summary.json`, `metrics.jsonl` and `config.json` of the run's folder are read, as data: the
folder may come from anybody, and nothing that it names is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_flax.train.errors import ConfigError
from bilevel_flax.train.metrics.jsonl import read_metrics
from bilevel_flax.train.workdir import read_json

_PREFIX = "mixture/"
# Shares come from a softmax in float32; what is further off is no mixture.
_ROUNDING = 1e-3
_MOST = 2**40  # steps, sequences
_POINTS = 64  # at which a stage's mean is taken


class Stage(NamedTuple):
    """A part of the run that is read with one mixture.

    Attributes:
        start: where it begins, in [0, 1) of the run.
        shares: domain -> share; they sum to 1.
    """

    start: float
    shares: dict[str, float]


class LearnedMixture(NamedTuple):
    """What a run learned about its domains.

    Attributes:
        shares: domain -> share at the end; they sum to 1.
        history: (step, shares) as they were logged, by step; empty: they were not.
        steps: of the run.
        sequences: that the run read in all; None: its config does not say.
        length: tokens of a sequence; None: its config does not say.
        paths: domain -> the file that the run read it from, as far as its config says.
    """

    shares: dict[str, float]
    history: list[tuple[int, dict[str, float]]]
    steps: int
    sequences: int | None
    length: int | None
    paths: dict[str, str]

    def stages(self, starts: Sequence[float]) -> list[Stage]:
        """The curriculum: between two starts the mean of what was learned there.

        Args:
            starts: where the stages begin, ascending from 0, each in [0, 1).
        """
        names = list(self.shares)
        history = self.history or [(self.steps, self.shares)]
        at = np.array([step for step, _ in history]) / max(self.steps, 1)
        logged = np.array([[shares[name] for name in names] for _, shares in history])

        def mean(start, stop):
            points = start + (stop - start) * (np.arange(_POINTS) + 0.5) / _POINTS
            columns = [np.interp(points, at, column).mean() for column in logged.T]
            return _normalized(dict(zip(names, columns, strict=True)))

        stops = [*starts[1:], 1.0]
        return [Stage(a, mean(a, b)) for a, b in zip(starts, stops, strict=True)]


def load(workdir: Path) -> LearnedMixture:
    """Reads a finished run's folder.

    Raises:
        ConfigError: there is no run, it has not ended, it learned no mixture, or its files are
            damaged.

    Example:
        >>> import json, pathlib, tempfile
        >>> from bilevel_flax.train import mixture
        >>> run = pathlib.Path(tempfile.mkdtemp())  # of a finished run, in truth
        >>> shares = {"wiki": 0.7, "code": 0.3}
        >>> _ = (run / "summary.json").write_text(json.dumps({"mixture": shares}))
        >>> config = {"steps": 9, "batch_size": 8, "length": 64}
        >>> _ = (run / "config.json").write_text(json.dumps(config))
        >>> mixture.load(run).shares
        {'wiki': 0.7, 'code': 0.3}
    """
    if not workdir.is_dir():
        raise ConfigError(f"{workdir}: there is no such folder; name the --workdir of a run")
    if not (workdir / "summary.json").is_file():
        raise ConfigError(
            f"{workdir} has no summary.json: it is no run, or one that has not ended (the command "
            "that began it goes on with it)"
        )
    summary = _mapping(workdir / "summary.json")
    if not summary.get("mixture"):
        raise ConfigError(
            f"{workdir} learned no mixture: its summary.json has no `mixture` (domain -> share); "
            "configs/lm_data_mixing.py and lm_pod.py learn one"
        )
    shares = _shares(summary["mixture"], f"{workdir / 'summary.json'}: mixture")
    path = workdir / "config.json"
    config = _mapping(path) if path.is_file() else {}
    history = _history(workdir / "metrics.jsonl", list(shares))
    steps = _count(config.get("steps")) or (history[-1][0] if history else 1)
    batch_size = _count(config.get("batch_size"))
    return LearnedMixture(
        shares=shares,
        history=[row for row in history if row[0] <= steps],
        steps=steps,
        sequences=None if batch_size is None else batch_size * steps,
        length=_count(config.get("length")),
        paths=_paths(config, list(shares)),
    )


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged (no JSON object): bring it back or delete it")
    return content


def _shares(given: Any, where: str) -> dict[str, float]:
    fine = isinstance(given, Mapping) and all(
        isinstance(name, str) and name and _is_share(share) for name, share in given.items()
    )
    total = math.fsum(given.values()) if fine else 0.0
    if not fine or len(given) < 2 or abs(total - 1) > _ROUNDING:
        what = f", got {len(given)} with the sum {total:.6g}" if fine else ""
        raise ConfigError(
            f"{where} is no mixture: at least two names with shares >= 0 that sum to 1{what}"
        )
    return _normalized(given)


def _is_share(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= 1 + _ROUNDING  # no NaN either


def _normalized(shares: Mapping[str, float]) -> dict[str, float]:
    # In float64: samplers refuse probabilities that sum to 1 only as well as float32 can.
    total = math.fsum(shares.values())
    return {name: float(share) / total for name, share in shares.items()}


def _history(path: Path, names: list[str]) -> list[tuple[int, dict[str, float]]]:
    if not path.is_file():
        return []
    keys = {name: _PREFIX + name for name in names}
    rows = [
        (row["step"], {name: row[key] for name, key in keys.items()})
        for row in read_metrics(path)
        if 0 <= row["step"] < _MOST and all(key in row for key in keys.values())
    ]
    rows = [(step, _shares(shares, f"{path}, step {step}")) for step, shares in rows]
    return sorted(rows, key=lambda row: row[0])


def _count(value: Any) -> int | None:
    fine = isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST
    return value if fine else None


def _paths(config: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    """Domain -> file, where the run's config names it."""
    domains = config.get("domains")
    if not isinstance(domains, Mapping):
        return {}
    return {name: domains[name] for name in names if isinstance(domains.get(name), str)}
