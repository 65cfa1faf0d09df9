"""Prints the oldest versions that pyproject.toml allows, `name==version` a line, for pip.

Extras for development are left out: they are tools, not what a user installs.
"""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["datasets"], *EXTRAS["all"]]
for line in LINES:
    if line.startswith("bilevel-flax["):
        continue
    name, version = re.fullmatch(r"([\w.\[\]-]+)>=([\w.]+)(?:,<[\w.]+)?", line).groups()
    print(f"{name}=={version}")
