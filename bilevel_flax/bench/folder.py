"""The folder of one bench: what it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_flax.train.config import ConfigError


def claim(out: Path, content: Mapping[str, Any]) -> None:
    """Makes the folder this bench's own: rows of different budgets must not be compared.

    Args:
        out: the folder; made where it is not there.
        content: what may not change, as JSON.

    Raises:
        ConfigError: it cannot be written, is damaged, or holds another bench.
    """
    path = out / "bench.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "results.csv").open("a"):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out={out}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    if not path.exists():
        path.write_text(json.dumps(dict(content), indent=2) + "\n")
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): use another --out") from error
    different = [
        f"{key} {before.get(key)!r}, not {value!r}"
        for key, value in content.items()
        if before.get(key) != value
    ]
    if different:
        raise ConfigError(
            f"--out={out} holds another bench ({'; '.join(different)}): give the same options to "
            "go on with it, or another --out"
        )
