"""What benchmarks/collapse.py says of the networks found."""

import sys

import numpy as np

from benchmarks import collapse
from examples.darts.collapse import search, space
from examples.darts.collapse import table as tables

SKIP, CONVOLUTION = space.OPERATIONS


def row(solver: str, selection: str, seed: int, skips: int) -> collapse.Row:
    genotype = (SKIP,) * skips + (CONVOLUTION,) * (6 - skips)
    return collapse.Row(solver, selection, seed, " ".join(genotype), 10.0, 1.0)


def test_regret_is_to_the_best_mean_and_half_of_the_edges_a_collapse():
    accuracies = np.linspace(0.37, 1.0, 64)  # .01 apart; in the order of `genotypes`
    rows = [row("soba", "strongest", seed, skips) for seed, skips in enumerate((0, 1, 6))]
    line = collapse.summary(rows, accuracies)
    assert line["collapsed"] == "1 of 3"
    # No skip is the last network, one skip (on the first edge) 32 places before it, six the first.
    assert (line["median regret"], line["worst"]) == ("32.00", "63.00")
    assert line["skips of 6"] == "2.3"


def test_searches_that_were_done_are_not_done_again(tmp_path, monkeypatch, capsys):
    asked = []

    class Searcher:
        def __init__(self, method, decay):
            self.method = method

        def __call__(self, sides, seed):
            asked.append((self.method, seed))

    monkeypatch.setattr(search, "Searcher", Searcher)
    monkeypatch.setattr(search, "halves", lambda seed: None)
    found = [search.Found(way, (CONVOLUTION,) * 6, 4000.0) for way in search.SELECTIONS]
    monkeypatch.setattr(search, "select", lambda *_: iter(found))
    monkeypatch.setattr(tables, "read", lambda: np.full((64, 2), 0.5))
    for seeds in ("1", "2"):
        words = ["--out", str(tmp_path), "--solvers", "soba,darts1", "--seeds", seeds]
        monkeypatch.setattr(sys, "argv", ["collapse.py", *words])
        collapse.main()
    assert asked == [("soba", 0), ("darts1", 0), ("soba", 1), ("darts1", 1)]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "darts1" in last and "perturbation" in last and "0 of 2" in last
