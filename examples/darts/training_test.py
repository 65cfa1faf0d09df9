"""Training from scratch: it learns, goes on where it was stopped, and refuses other settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bilevel_flax.train.config import ConfigError, load
from examples.darts import genotype, random_cells, retrain, training
from examples.darts import images as images_of
from examples.darts.images import Images, Part

# No convolutions: the cheapest network to compile.
CELL = ((("max_pool_3x3", 0), ("skip_connect", 1)),) * 4
POOLS = genotype.Genotype(CELL, CELL)
SETTINGS = (
    "retrain.width=4",
    "retrain.cells=1",
    "retrain.reductions=()",
    "retrain.stem_stride=1",
    "retrain.epochs=6",
    "retrain.batch_size=16",
    "retrain.drop_path=0.1",
    "retrain.cutout=2",
    "retrain.auxiliary=0.3",
    "retrain.learning_rate=0.02",
)


@pytest.fixture(scope="module")
def images() -> Images:
    """Two classes: the upper half is bright, or the lower one."""
    rng = np.random.default_rng(0)

    def part(n: int) -> Part:
        label = np.arange(n, dtype=np.int32) % 2
        image = rng.normal(size=(n, 8, 8, 1)).astype(np.float32)
        image[label == 0, :4] += 2
        image[label == 1, 4:] += 2
        return Part(image, label)

    return Images(part(96), part(64), part(32), part(100), 2)


@pytest.mark.slow
def test_seeds_are_trained_once_and_kept(images, tmp_path, monkeypatch):
    config = load("configs/darts_mnist.py", SETTINGS)
    path, said = tmp_path / "retrained.json", []
    first = training.train_seeds(config, POOLS, images, 2, path, said.append)
    assert [run["seed"] for run in first["runs"]] == [0, 1]
    assert first["test_error"] < 0.15  # a guess: 0.5
    assert first["runs"][0]["train_loss"] != first["runs"][1]["train_loss"]
    assert json.loads(path.read_text()) == first

    def not_again(*_):
        raise AssertionError("a finished seed is trained again")

    monkeypatch.setattr(training.Trainer, "__call__", not_again)
    assert training.train_seeds(config, POOLS, images, 2, path, said.append) == first
    other = load("configs/darts_mnist.py", [*SETTINGS, "retrain.width=6"])
    with pytest.raises(ConfigError, match="holds results of another settings"):
        training.train_seeds(other, POOLS, images, 2, path, said.append)


def test_a_retraining_sees_all_of_mnist_and_the_search_its_parts(monkeypatch):
    config, asked = load("configs/darts_mnist.py"), []

    def load_source(name, splits, **kwargs):
        asked.append(splits)
        raise ValueError("no data")

    monkeypatch.setattr(images_of.sources, "load", load_source)
    for splits in (None, config.retrain.splits):
        with pytest.raises(ValueError, match="no data"):
            images_of.load_images(config, splits)
    assert sum(asked[0][:2]) == 21_000 and sum(asked[1][:2]) == 60_000


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (retrain, ["--genotype", "nowhere.json"], "error: --genotype=nowhere.json: no such file"),
        (
            retrain,
            ["--genotype", "g.json", "--seeds", "0"],
            "error: --seeds must be an integer >= 1, got 0",
        ),
        (random_cells, ["--cells", "0"], "error: --cells must be an integer >= 1, got 0"),
        (random_cells, ["--against", "nowhere"], "error: --against=nowhere"),
        (
            retrain,
            ["--genotype", "g.json", "--config.retrain.drop_path=1"],
            "error: --config.retrain.drop_path=1.0: must lie in [0, 1)",
        ),
    ],
)
def test_mistakes_end_in_one_line(command, arguments, says, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrain, "load_images", lambda config, splits: images)
    genotype.save(tmp_path / "g.json", POOLS)
    config = ["--config", str(Path("configs/darts_mnist.py").resolve())]
    monkeypatch.chdir(tmp_path)
    assert command.main([*arguments, *config, "--workdir", str(tmp_path / "w")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(says)
    assert told.count("\n") == 1
