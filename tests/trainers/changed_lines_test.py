"""A script in each trainer, without and with a mixture that is learned: few lines change."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path

import lm
import pytest
from flax import nnx

FOLDER = Path(__file__).parent / "scripts"
NAMES = sorted(path.name.removesuffix("_after.py") for path in FOLDER.glob("*_after.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_dozen_lines_make_a_trainer_bilevel(name: str):
    before, after = (
        (FOLDER / f"{name}_{when}.py").read_text().splitlines() for when in ("before", "after")
    )
    lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
    changed = [line for line in lines if line[1:].strip() and line[0] in "+-"]
    for sign in "+-":
        assert 0 < sum(line[0] == sign for line in changed) <= 12, changed
    # Nothing squeezed: each line is one that the formatter leaves alone.
    assert all(len(line) <= 101 and ";" not in line for line in changed)


@pytest.mark.parametrize("name", ["flax", "nnx"])
def test_the_scripts_run(name: str):
    before, after = (
        runpy.run_path(str(FOLDER / f"{name}_{when}.py")) for when in ("before", "after")
    )
    assert float(before["loss"]) < 2.3  # log of the vocabulary: 2.4
    if name == "flax":
        x = after["state"].opt_state.outer_params
    else:
        x = nnx.as_pure(after["optimizer"].opt_state.outer_params)
    assert float(lm.MIXTURE.shares(x)[0]) > 0.5  # the target counts upwards
