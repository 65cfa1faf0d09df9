"""The accelerator benchmark in its tiny size: every entry measures what it says."""

from __future__ import annotations

import copy
import importlib.util

import jax
import pytest

from benchmarks import gpu


def assert_measured(results: dict, names) -> None:
    assert set(results["entries"]) == set(names)
    assert results["left_out"] == []
    for name, rows in results["entries"].items():
        assert rows, name
        if name == "torch" and importlib.util.find_spec("torch") is None:
            assert [row["error"] for row in rows] == ["not measured: No module named 'torch'"]
            continue
        for row in rows:
            assert "error" not in row, (name, row)
            if name == "attention":  # bfloat16 holds 8 bits
                assert all(0 < row[f"{of}_error"] < 0.02 for of in ("value", "gradient", "tangent"))
                continue
            speed = row.get("step_seconds") or 1 / row["steps_per_second"]
            assert speed > 0 and (name == "torch" or row["compile_seconds"] > 0)


def test_an_entry_measures_and_what_begins_too_late_is_said_to_be_left_out():
    added, saved = [], []
    add = lambda name, row: added.append((name, row))
    save = lambda results: saved.append(copy.deepcopy(results))
    results = gpu.run("tiny", 5, ["weights"], add, save)
    assert_measured(results, ["weights"])
    assert [name for name, _ in added] == ["weights"] * 2
    assert added[0][1]["variant"] == "100 weights"
    # After each row the file holds the rows that are done, and the names of the others.
    assert [len(each["entries"].get("weights", [])) for each in saved] == [0, 1, 2]
    assert saved[1]["left_out"] == ["weights: 1000 weights"] and saved[-1] == results
    late = gpu.run("tiny", -1.0, ["weights", "cnn"], add)
    assert late["entries"] == {}
    assert late["left_out"][:2] == ["weights: 100 weights", "cnn: plain"]


def test_an_error_is_the_result_of_its_own_row(monkeypatch):
    def too_large():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nlong report")

    def entry(size):
        yield gpu.Row("large", too_large)
        yield gpu.Row("small", lambda: {"step_seconds": 1.0})
        raise NotImplementedError("the third needs another device")

    other = lambda size: iter([gpu.Row("only", lambda: {"step_seconds": 2.0})])
    monkeypatch.setattr(gpu, "ENTRIES", {"darts": other, "ours": entry, "theirs": other})
    order = []
    results = gpu.run("tiny", 5, None, lambda name, row: order.append((name, row["variant"])))
    assert order == [
        ("ours", "large"),
        ("theirs", "only"),
        ("ours", "small"),
        ("ours", "all of it"),
        ("darts", "only"),
    ]
    large, small, rest = results["entries"]["ours"]
    assert large["error"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert small["step_seconds"] == 1.0 and "another device" in rest["error"]
    assert results["left_out"] == []


@pytest.mark.slow
def test_every_entry_runs_on_a_cpu():
    assert_measured(gpu.run("tiny", 30, None, print), gpu.ENTRIES)
