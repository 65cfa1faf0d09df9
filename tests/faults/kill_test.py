"""The short form of `kill.py`, which takes as long as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("kills", "pairs", "steps"),
    [(1, 0, 300), pytest.param(20, 4, 1000, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_no_kill_shows_in_the_results(kills: int, pairs: int, steps: int):
    program, counts = Path(__file__).parent / "kill.py", {"kills": kills, "pairs": pairs}
    arguments = [f"--{name}={value}" for name, value in (counts | {"steps": steps}).items()]
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["single"]["kills"] == kills
    assert found["single"]["lost"] == found["single"]["different"] == 0
    if pairs:
        assert found["pair"]["kills"] == pairs
