"""The accelerator benchmark in its tiny size: every entry measures what it says."""

from __future__ import annotations

import pytest

from benchmarks import gpu


def assert_measured(results: dict, names) -> None:
    assert list(results["entries"]) == list(names)
    assert results["left_out"] == []
    for name, rows in results["entries"].items():
        assert rows, name
        for row in rows:
            assert "error" not in row, (name, row)
            speed = row.get("step_seconds") or 1 / row["steps_per_second"]
            assert speed > 0 < row["compile_seconds"]


def test_an_entry_measures_and_what_begins_too_late_is_said_to_be_left_out():
    added = []
    add = lambda name, row: added.append((name, row))
    results = gpu.run("tiny", 5, ["weights"], add)
    assert_measured(results, ["weights"])
    assert [name for name, _ in added] == ["weights"] * 2
    assert added[0][1]["variant"] == "100 weights"
    late = gpu.run("tiny", -1.0, ["weights", "cnn"], add)
    assert late["entries"] == {} and late["left_out"] == ["weights", "cnn"]


@pytest.mark.slow
def test_every_entry_runs_on_a_cpu():
    assert_measured(gpu.run("tiny", 30, None, print), gpu.ENTRIES)
