"""Hugging Face data sets as sources, and a learned mixture read by `interleave_datasets`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bilevel_flax.trainers import pairs

# tests/datasets would do for a module of that name.
pytest.importorskip("datasets.arrow_dataset", reason="needs datasets: make test-trainers")
datasets = pytest.importorskip("datasets")


def of(values, **more):
    return datasets.Dataset.from_dict({"x": list(values), **more})


@pytest.mark.parametrize("streamed", [False, True], ids=["table", "stream"])
def test_minibatches_know_where_their_rows_are(streamed: bool):
    from bilevel_flax.trainers.datasets import minibatches

    data = of(range(100, 110))
    data = data.to_iterable_dataset() if streamed else data
    found = list(minibatches(data, 4, seed=1, epochs=3))
    assert len(found) == 6
    for minibatch in found:
        np.testing.assert_array_equal(minibatch["x"], 100 + minibatch["index"])
        assert minibatch["index"].shape == (4,)
    orders = {tuple(np.concatenate([m["index"] for m in found[i : i + 2]])) for i in (0, 2, 4)}
    assert len(orders) == 3  # shuffled anew, and the same again from the same seed
    again = minibatches(data, 4, seed=1)
    for minibatch, other in zip(found, again, strict=False):
        np.testing.assert_array_equal(minibatch["index"], other["index"])
    with pytest.raises(ValueError, match="batch_size=20: the data set has fewer examples"):
        next(minibatches(data, 20))
    own = minibatches(of(range(4), index=[9, 8, 7, 6]), 4, epochs=1)
    assert sorted(next(own)["index"].tolist()) == [6, 7, 8, 9]


def test_domains_have_numbers_and_two_streams_are_pairs():
    from bilevel_flax.trainers.datasets import interleaved, minibatches

    train = interleaved({"a": of(range(0, 50)), "b": of(range(100, 150))}, [0.25, 0.75])
    stream = pairs(minibatches(train, 8, epochs=1), minibatches(of(range(5)), 2))
    seen = []
    for pair in stream:
        np.testing.assert_array_equal(pair["inner"]["domain"], pair["inner"]["x"] >= 100)
        assert pair["outer"]["x"].max() < 5
        seen.append(pair["inner"]["domain"])
    assert np.mean(np.concatenate(seen)) == pytest.approx(0.75, abs=0.1)
    with pytest.raises(ValueError, match="'b' has 0.0, and reading would never end"):
        interleaved({"a": of(range(5)), "b": of(range(5))}, [1.0, 0.0])


def test_the_reader_draws_what_was_learned(tmp_path):
    mixture = pytest.importorskip("bilevel_flax.train.mixture", reason="needs the extra [train]")
    shares = {"a": 0.1, "b": 0.6, "c": 0.3}
    (tmp_path / "summary.json").write_text(json.dumps({"mixture": shares}))
    (tmp_path / "names.json").write_text(json.dumps(["c", "a", "b"]))
    out = tmp_path / "mix.json"
    mixture.export(mixture.Options(tmp_path, "datasets", out, reader=tmp_path / "names.json"))
    found = json.loads(out.read_text())
    parts = [
        datasets.Dataset.from_dict({"name": [name] * 1500}).to_iterable_dataset()
        for name in found["datasets"]
    ]
    read = datasets.interleave_datasets(parts, probabilities=found["probabilities"], seed=0)
    drawn = [row["name"] for row in read.take(2000)]
    for name, share in shares.items():
        assert drawn.count(name) / 2000 == pytest.approx(share, abs=0.03)
    datasets.interleave_datasets(parts, probabilities=found["stages"][0]["probabilities"], seed=1)
