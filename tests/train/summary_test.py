"""What the summary says of a run's cost and of its hypergradient, and what it lacks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optax
import pytest
from health_test import monitor, running

import bilevel_flax as bf
from bilevel_flax.train import summary, train_loop
from bilevel_flax.train.run_config import HealthConfig, RunConfig
from bilevel_flax.train.train_loop import Trained

CHECK = {"step": 40, "hypergradient_cosine": 0.75, "health/reference_residual": 0.5}


@pytest.fixture
def summarize(tmp_path: Path):
    task, _, _, state, _ = running()
    totals = {"oracle_units": 170.0, "seconds": 2.0}

    def call(row: dict[str, Any], **health: bool) -> tuple[dict[str, Any], list[str]]:
        lines: list[str] = []
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        run = RunConfig(steps=40, health=HealthConfig(**health))
        trained = Trained(state, totals, monitor(40))
        return summary.summarize(run, task, trained, tmp_path, lines.append), lines

    return call


def test_costs_are_those_of_the_whole_run(summarize):
    results, _ = summarize(CHECK)
    assert results["gradient_units_per_step"] == 4.25  # full passes included
    assert results["steps_per_second"] == 20
    assert results["seconds_per_step"] == 0.05


def test_a_check_that_was_logged_is_not_made_again(summarize):
    results, lines = summarize(CHECK)
    assert results["hypergradient_cosine"] == 0.75
    assert results["hypergradient_reference_residual"] == 0.5
    assert not lines
    assert summarize({**CHECK, "step": 39})[0]["hypergradient_cosine"] > 0.9


def test_what_is_not_there_is_said(summarize):
    off, lines = summarize(CHECK, summary=False)
    assert math.isnan(off["hypergradient_cosine"])
    assert "not measured" in lines.pop()
    idle, lines = summarize(CHECK | {"hypergradient_cosine": "NaN"})
    assert math.isnan(idle["hypergradient_cosine"])
    assert "hypergradient_cosine: none" in lines.pop()


def test_the_cost_line_names_the_passes_too():
    _, solver, _, _, source = running()
    assert train_loop._cost_line(solver) == "cost: 4 gradient units a step (plain training: 1)"
    steps = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1)}
    srba = bf.srba(source.problem, **steps, period=7, num_inner_batches=6, num_outer_batches=5)
    assert "each full pass" in train_loop._cost_line(srba)
