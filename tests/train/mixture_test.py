"""A learned mixture is handed over as its readers want it, out of a folder of anybody's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import grain
import numpy as np
import pytest

from bilevel_flax import cli

STEPS, BATCH, LENGTH = 100, 400, 64
END = {"a": 0.1, "b": 0.6, "c": 0.3}
START = dict.fromkeys(END, 1 / 3)


def row(step: int) -> dict:
    share = step / STEPS
    mixed = {f"mixture/{n}": (1 - share) * START[n] + share * END[n] for n in END}
    return {"step": step, **mixed}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose mixture went in a straight line from equal shares to END."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"mixture": END, "target": "b"}))
    config = {"steps": STEPS, "batch_size": BATCH, "length": LENGTH, "domains": {"a": "data/a*"}}
    (run / "config.json").write_text(json.dumps(config))
    rows = [{"step": 5, "inner_loss": 1.0}, *map(row, range(0, STEPS + 1, 20))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return run


@pytest.fixture
def export(folder: Path, tmp_path: Path, capsys):
    def run(to: str, *more: str, out: str = "out.json"):
        code = cli.main(["mixture", str(folder), "--to", to, "--out", str(tmp_path / out), *more])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads((tmp_path / out).read_text()), printed.out

    return run


def close(found: dict, expected: dict, atol: float = 1e-12) -> None:
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=atol)


def test_the_end_point_and_the_way_there(export):
    content, _ = export("json", "--stages", "4")
    close(content["mixture"], END)
    starts = [stage["start_sequence"] for stage in content["stages"]]
    assert starts == [0, 10_000, 20_000, 30_000]
    assert [s["start_token"] for s in content["stages"]] == [start * LENGTH for start in starts]
    for i, stage in enumerate(content["stages"]):
        share = (i + 0.5) / 4
        close(stage["mixture"], {n: (1 - share) * START[n] + share * END[n] for n in END})
        assert abs(sum(stage["mixture"].values()) - 1) < 1e-15
    # What is read in all does not depend on the number of stages.
    one, _ = export("json", "--stages", "1", out="one.json")
    mean = {n: np.mean([s["mixture"][n] for s in content["stages"]]) for n in END}
    close(one["stages"][0]["mixture"], mean)


def test_grain_mixes_what_maxtext_reads(export, tmp_path: Path):
    content, printed = export("maxtext")
    assert {name: entry["path"] for name, entry in content.items()} == {
        "a": "data/a*",
        "b": "b",
        "c": "c",
    }
    assert "note: the run does not say where 'b', 'c' lies" in printed
    close({name: entry["weight"] for name, entry in content.items()}, END)
    # As MaxText reads it: sources by name, weights by name, one mixed stream.
    sources = {n: grain.MapDataset.source([n]).repeat().to_iter_dataset() for n in content}
    weights = {name: float(entry["weight"]) for name, entry in content.items()}
    stream = iter(grain.IterDataset.mix(sources, weights))
    drawn = [next(stream) for _ in range(500)]
    close({name: drawn.count(name) / 500 for name in END}, END, atol=0.01)

    (tmp_path / "own.json").write_text(json.dumps({n: {"path": f"gs://{n}*"} for n in "cab"}))
    content, printed = export(
        "maxtext", "--reader", str(tmp_path / "own.json"), "--stage=0", "--stages=2", out="2.json"
    )
    assert "note" not in printed
    assert list(content) == ["c", "a", "b"]
    assert content["c"]["path"] == "gs://c*"
    assert content["a"]["weight"] == pytest.approx(0.75 / 3 + 0.25 * 0.1)


def test_what_is_never_read_is_no_trap_for_its_readers(export, folder: Path):
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").write_text(json.dumps({"mixture": {**END, "b": 0.9, "c": 0.0}}))
    content, printed = export("maxtext")
    assert list(content) == ["a", "b"]
    assert "note: 'c' has weight 0 and is left out" in printed
    sources = {n: grain.MapDataset.source([n]).repeat().to_iter_dataset() for n in content}
    next(iter(grain.IterDataset.mix(sources, {n: e["weight"] for n, e in content.items()})))
    content, printed = export("datasets", out="2.json")
    assert content["probabilities"] == [0.1, 0.9, 0.0]
    assert "note: 'c' has probability 0" in printed
    content, _ = export("levanter", out="3.json")
    assert content["data"]["train_weights"][0][1]["c"] == 0


def test_levanters_stages_begin_at_blocks(export):
    content, printed = export("levanter")
    assert content["data"]["mixture_block_size"] == 2048
    stages = content["data"]["train_weights"]
    starts = [start for start, _ in stages]
    assert starts[0] == 0
    assert len(starts) == 8
    assert all(start % 2048 == 0 for start in starts)
    assert starts == sorted(set(starts))
    for _, weights in stages:
        assert list(weights) == list(END)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-15)
    assert printed.count("note") == 0
    # Twice the tokens in sequences of four times the length: half as many sequences.
    tokens, length = str(2 * STEPS * BATCH * LENGTH), str(4 * LENGTH)
    content, _ = export("levanter", "--tokens", tokens, "--length", length, out="2.json")
    assert content["data"]["train_weights"][-1][0] == pytest.approx(20_000 * 7 / 8, abs=1024)
    content, printed = export("levanter", "--block-size", "4", "--stages", "2", out="3.json")
    assert "a block of 4 holds less than one sequence of 'a'" in printed
    # A run shorter than a block is one stage.
    content, _ = export("levanter", "--tokens", "6400", out="4.json")
    assert [start for start, _ in content["data"]["train_weights"]] == [0]


def test_probabilities_are_as_numpy_wants_them(export, folder: Path):
    singles = {n: float(np.float32(p)) + 2e-7 for n, p in END.items()}
    (folder / "summary.json").write_text(json.dumps({"mixture": singles}))
    content, _ = export("datasets", "--stages", "3")
    assert content["datasets"] == list(END)
    for part in (content, *content["stages"]):
        assert abs(sum(part["probabilities"]) - 1) < 1e-15
        np.random.default_rng(0).choice(3, p=part["probabilities"])


def test_without_logs_the_end_is_all_there_is(export, folder: Path):
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").unlink()
    content, _ = export("json", "--stages", "2")
    for stage in content["stages"]:
        close(stage["mixture"], content["mixture"])
    assert "start_token" not in content["stages"][0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--to=maxtxt"], 'levanter, datasets, json (did you mean "maxtext"?)'),
        (["--stages=0"], "--stages must be an integer >= 1, got 0"),
        (["--stage=9", "--to=maxtext"], "--stage=9: there are 8 stages, 0 to 7"),
        (["--tokens=3"], "--tokens=3 are less than one sequence of 64"),
        (["--out=RUN/summary.json"], "is there already: choose another name or remove it"),
        (["--out=RUN/no/file.json"], "there is no folder"),
        ([f"--out={'n' * 300}"], "n cannot be written: File name too long"),
        (["--reader=RUN/none.json"], "--reader=RUN/none.json: No such file"),
        (["--reader=RUN/other.json"], "only in the run: 'c'; only in the reader: 'd'"),
        (["--reader=RUN/twice.json"], "its domains differ from the run's"),
        (["--reader=RUN/number.json"], "must hold a list of the reader's domains"),
    ],
)
def test_mistakes_end_in_one_line(more, says: str, folder: Path, tmp_path: Path, capsys):
    (folder / "other.json").write_text('["a", "b", "d"]')
    (folder / "twice.json").write_text('["a", "b", "c", "c"]')
    (folder / "number.json").write_text("5")
    given = ["--to=json", f"--out={tmp_path / 'out.json'}"]
    more = [part.replace("RUN", str(folder)) for part in more]
    assert cli.main(["mixture", str(folder), *given, *more]) == 2
    error = capsys.readouterr().err
    assert says.replace("RUN", str(folder)) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


NOT_MIXTURES = [
    {},
    {"mixture": {}},
    {"mixture": None},
    {"mixture": "a"},
    {"mixture": {"a": 1.0}},
    {"mixture": {"a": 0.5, "b": 0.6}},
    {"mixture": {"a": 1.5, "b": -0.5}},
    {"mixture": {"a": "0.5", "b": 0.5}},
    {"mixture": {"a": True, "b": 0.0}},
    {"mixture": {"a": float("nan"), "b": 1.0}},
    {"mixture": {"a": 10**400, "b": 1.0}},
    {"mixture": {"a": {"call": "shutil:rmtree"}, "b": 1.0}},
    [],
    5,
]


@pytest.mark.parametrize("summary", NOT_MIXTURES, ids=lambda s: str(s)[:30])
def test_a_run_without_a_mixture(summary, folder: Path, tmp_path: Path, capsys):
    (folder / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "out.json"
    assert cli.main(["mixture", str(folder), "--to=json", f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "mixture" in error or "damaged" in error
    assert not out.exists()


def test_a_folder_that_is_no_run_or_has_not_ended(folder: Path, tmp_path: Path, capsys):
    out = f"--out={tmp_path / 'out.json'}"
    assert cli.main(["mixture", str(tmp_path / "no"), "--to=json", out]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    (folder / "summary.json").unlink()
    assert cli.main(["mixture", str(folder), "--to=json", out]) == 2
    assert "has no summary.json" in capsys.readouterr().err
    (folder / "summary.json").write_text("[" * 100_000)
    assert cli.main(["mixture", str(folder), "--to=json", out]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_nothing_of_the_folder_runs(folder: Path, tmp_path: Path, monkeypatch, capsys):
    """Neither what its config names, nor modules that lie in it or in the working directory."""
    evil = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    for place in (folder, tmp_path):
        for name in ("json", "numpy", "payload", "bilevel_flax", "sitecustomize", "examples"):
            (place / f"{name}.py").write_text(evil)
    config = {"task": {"call": "payload:make"}, "report": "payload:sections", "steps": 10**30}
    config["domains"] = {"a": {"call": "payload:make"}, "b": 5}
    (folder / "config.json").write_text(json.dumps(config))
    imported = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    assert cli.main(["mixture", ".", "--to=levanter", f"--out={tmp_path / 'out.json'}"]) == 0
    assert os.getcwd() not in sys.path
    assert "payload" not in set(sys.modules) - imported
    assert not list(tmp_path.rglob("ran"))
