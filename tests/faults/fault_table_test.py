"""The tests that the table of faults names are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_in_the_table_exists():
    named = re.findall(r"`([\w/]+_test\.py)(?:::(\w+))?`", (TESTS / "faults/README.md").read_text())
    assert len(named) > 40
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (TESTS / path).exists() or f"def {name}" not in (TESTS / path).read_text()
    ]
    assert not missing
