"""`configs/darts_cifar10.py` on the part of CIFAR-10 that lies in a tar: the loop, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bilevel_flax.train import config as configs
from bilevel_flax.train import experiment

CONFIG = Path(__file__).parents[2] / "configs" / "darts_cifar10.py"
SMALL = [
    "network.width=2",
    "network.cells=2",
    "network.reductions=(1,)",
    "network.stem_stride=4",
    "network.as_matrix=True",
    "data.splits=(400,400,200)",
    "data.held_out=100",
    "batch_size=8",
    "eval_every=20",
]


@pytest.mark.slow
def test_twenty_steps_in_a_reduced_width(data_dir, tmp_path):
    settings = [*SMALL, f"data.manual_dir={data_dir}", "steps=20"]
    experiment.train_and_evaluate(configs.load(f"{CONFIG}:darts1", settings), tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20
    assert np.isfinite([last["inner_loss"], last["outer_loss"]]).all()
    cells = json.loads((tmp_path / "genotype.json").read_text())
    assert set(cells) >= {"normal", "reduce"} and len(cells["normal"]) == 4
