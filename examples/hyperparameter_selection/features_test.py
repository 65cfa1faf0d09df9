"""covtype: the full set as scikit-learn hands it out, and the subset in files."""

import gzip
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn import datasets

from bilevel_flax.train.config import ConfigError
from examples.datasets import catalog
from examples.hyperparameter_selection import exact, features

SHAPE = (581_012, 54)


def covtype(shape=SHAPE, classes=7):
    """A table of scikit-learn's shape that takes no memory: each row starts one number later."""
    numbers = np.random.default_rng(0).integers(0, 7000, size=shape[0] + shape[1]).astype(float)
    table = np.lib.stride_tricks.sliding_window_view(numbers, shape[1])[: shape[0]]
    return SimpleNamespace(data=table, target=1 + np.arange(shape[0]) % classes)


def refused(*args):
    with pytest.raises(ConfigError) as caught:
        features.load(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_full_covtype(monkeypatch):
    table = covtype()
    monkeypatch.setattr(datasets, "fetch_covtype", lambda download_if_missing: table)
    tracemalloc.start()
    try:
        found = features.load("covtype")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The inputs and both parts in float32: 125 and 100 MB; float64 would take twice that.
    assert peak < 300e6
    assert found.train.inputs.shape == (371_847, 54) and found.num_classes == 7
    assert found.validation.inputs.shape == (92_962, 54)
    assert set(found.train.labels) == set(range(7))
    whole = np.concatenate([found.train.inputs, found.validation.inputs])
    assert whole.min() == 0 and whole.max() == 1
    # No row twice, and another seed draws others.
    again = features.load("covtype", None, 1)
    assert not np.array_equal(again.train.labels, found.train.labels)
    counts = np.bincount(np.concatenate([found.train.labels, found.validation.labels]))
    assert (counts <= -(-SHAPE[0] // 7)).all()


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    data = exact.Data(rng.normal(size=(50, 3)).astype(np.float32), rng.integers(0, 4, size=50))
    z = rng.normal(size=12)
    whole: Any = exact.softmax(z, data)
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 7)
    blocks: Any = exact.softmax(z, data)
    for one, other in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    assert exact.softmax(z, data, curvature=False)[2] is None


def absent(download_if_missing=True):
    raise OSError("Data not found" if not download_if_missing else "<urlopen error timed out>")


@pytest.mark.parametrize(
    ("reachable", "expected"),
    [(False, "its source cannot be reached"), (True, "could not be fetched (<urlopen error")],
)
def test_covtype_without_a_network(reachable, expected, monkeypatch):
    monkeypatch.setattr(datasets, "fetch_covtype", absent)
    monkeypatch.setattr(catalog, "reachable", lambda url: reachable)
    message = refused("covtype")
    assert expected in message and "use covtype10k" in message


@pytest.mark.parametrize("table", [covtype((100, 54)), covtype((100, 53))])
def test_another_table_than_covtype(table, monkeypatch):
    monkeypatch.setattr(datasets, "fetch_covtype", lambda download_if_missing: table)
    assert f"has the shape {table.data.shape} and not {SHAPE}" in refused("covtype")


ROW = "1," + ",".join(["0.5"] * 54) + "\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"no gzip", "cannot be read as CSV"),
        (gzip.compress(ROW.encode())[:-9], "cannot be read as CSV"),
        (gzip.compress(b"1,a\n"), "cannot be read as CSV"),
        (gzip.compress(ROW.replace("1,", "1,2,", 1).encode()), "has 56 columns"),
        (gzip.compress((ROW + ROW.replace("1,", "2,", 1)).encode()), "has the label 2"),
    ],
    # The compressed bytes hold the time: as names they would differ between processes.
    ids=["no gzip", "truncated", "no number", "columns", "label"],
)
def test_damaged_covtype10k_is_named(content, expected, tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"covtype.5000.{part}.csv.gz").write_bytes(content)
    message = refused("covtype10k", str(tmp_path))
    assert "covtype.5000.train.csv.gz" in message and expected in message


def test_covtype10k_without_its_files(tmp_path):
    assert "--manual-dir DIR" in refused("covtype10k")
    assert f"manual_dir={tmp_path} lacks" in refused("covtype10k", str(tmp_path))
