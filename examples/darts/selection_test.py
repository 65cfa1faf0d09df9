"""What is taken from a run's records instead of the last and strongest."""

from __future__ import annotations

import json

import numpy as np
import pytest

from examples.darts import genotype, selection
from examples.darts.shares import named_shares, read_shares

NAMES = ("none", "skip", "conv")


def shares_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {cell: rng.dirichlet(np.ones(8), 14) for cell in genotype.CELLS}


def test_shares_are_read_as_they_were_logged(tmp_path):
    lines = [{"step": step, "loss": 1.0, **named_shares(shares_at(step))} for step in (10, 20)]
    lines.insert(1, {"step": 15, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, found = read_shares(tmp_path)
    assert steps == [10, 20]
    for cell in genotype.CELLS:
        np.testing.assert_allclose(found[cell], [shares_at(10)[cell], shares_at(20)[cell]])
    assert read_shares(tmp_path / "nowhere")[0] == []


def test_the_shares_before_the_residual_rises_are_taken(tmp_path):
    residuals = [1.0, 0.8, 0.6, 0.5, 0.5, 1.5, 2.0, 2.5, 3.0, 3.5]
    lines = [
        {"step": 10 * (i + 1), "adjoint_residual": residual, **named_shares(shares_at(i))}
        for i, residual in enumerate(residuals)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    step, found = selection.before_rise(tmp_path, None)
    assert step == 50  # the last before 1.5
    np.testing.assert_allclose(found["normal"], shares_at(4)["normal"])


def test_perturbation_keeps_what_hurts_most_and_the_edges_strength():
    weights = shares_at(3)
    useful = {cell: 1 + np.arange(14) % 7 for cell in genotype.CELLS}  # one operation an edge

    def error(tried):
        return -sum(tried[cell][np.arange(14), useful[cell]].sum() for cell in tried)

    found = selection.perturbed(error, weights)
    for cell, rows in found.items():
        np.testing.assert_allclose(rows.sum(1), 1)
        np.testing.assert_array_equal(rows[:, 1:].argmax(1) + 1, useful[cell])
        np.testing.assert_allclose(rows[:, 1:].max(1), weights[cell][:, 1:].max(1))
    genotype.derive(found)


def test_the_strongest_of_each_edge():
    weights = [[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]]
    assert selection.strongest(weights, NAMES) == ["none", "skip"]
    assert selection.strongest(weights, NAMES, ("none",)) == ["conv", "skip"]
    with pytest.raises(ValueError, match="leaves no operation"):
        selection.strongest(weights, NAMES, NAMES)
    with pytest.raises(ValueError, match="have shape"):
        selection.strongest(weights, NAMES[:2])


def test_selection_by_perturbation_asks_the_network_not_the_weights():
    """The largest weight is an operation that nobody needs."""
    weights = np.array([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]], np.float32)
    needed = np.array([[0.0, 0.1, 0.9], [0.0, 0.5, 0.2]])
    calls = []

    def score(mixture):
        np.testing.assert_allclose(mixture.sum(-1), 1, rtol=1e-5)
        calls.append(mixture)
        return float((needed * (mixture > 0)).sum())

    assert selection.strongest(weights, NAMES) == ["skip", "skip"]
    assert selection.select_by_perturbation(score, weights, NAMES) == ["conv", "skip"]
    assert len(calls) == 6
    # The edge with the most one-sided weights is decided first, and stays so.
    assert all((mixture[1] == [0, 1, 0]).all() for mixture in calls[3:])
    left = []  # to be trained on with: after the first decision, not after the last
    settle = lambda mixture: left.append(mixture.copy())
    selection.select_by_perturbation(score, weights, NAMES, settle=settle)
    np.testing.assert_allclose(left, [[weights[0], [0, 1, 0]]])


def test_stopping_before_a_signal_rises():
    fall, rise = np.linspace(2, 1, 50), np.linspace(1, 3, 50)
    signal = np.concatenate([fall, rise])
    stop = selection.stop_before_rise(signal, window=5, ratio=1.3)
    assert 50 <= stop < 75
    assert signal[stop - 4 : stop + 1].mean() <= 1.3 * 1.05
    assert selection.stop_before_rise(fall, window=5) == 49
    noisy = fall + 0.05 * np.random.default_rng(0).normal(size=50)
    assert selection.stop_before_rise(noisy, window=10) == 49
    with pytest.raises(ValueError, match="ratio"):
        selection.stop_before_rise(fall, window=5, ratio=1.0)
