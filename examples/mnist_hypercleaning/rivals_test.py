"""The rivals of `bench cleaning` on closed cases, and the bench's table and options."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel_flax import bench
from bilevel_flax.bench import Options
from bilevel_flax.train.config import ConfigError
from examples.mnist_hypercleaning import rivals, tables
from examples.mnist_hypercleaning.bench import _examples, average_precision, read
from examples.mnist_hypercleaning.task import Examples

CLASSES, SIDE = 3, 2
# bf.auto's learned weights are in task_test, and in the bench below.
UNAWARE = ("no_weights", "as_given")  # of what a clean example says
PLAIN = [name for name in rivals.METHODS if name not in ("weights", "meta_weight_net")]


def examples(given_of) -> Examples:
    rng = np.random.default_rng(0)

    def part(n):
        labels = (np.arange(n) % CLASSES).astype(np.int32)
        images = rng.normal(size=(n, SIDE, SIDE, 1)).astype(np.float32)
        images[np.arange(n), labels // SIDE, labels % SIDE, 0] += 6
        return images, labels

    (train, true), (clean, known), (test, tested) = part(300), part(30), part(90)
    given = given_of(true, rng).astype(np.int32)
    return Examples(
        train, given, true, given != true, clean, known, test, tested, train, CLASSES, ("a",) * 3
    )


@pytest.fixture(scope="module")
def without_noise():
    return rivals.Bout(examples(lambda true, rng: true.copy()), "linear", 400, 32, 0)


@pytest.fixture(scope="module")
def swapped():
    """Two in five labels of classes 0 and 1 exchanged."""

    def given(true, rng):
        return np.where((true < 2) & (rng.random(len(true)) < 0.4), 1 - true, true)

    return rivals.Bout(examples(given), "linear", 400, 32, 0)


@pytest.mark.parametrize("name", PLAIN)
def test_where_nothing_is_wrong_nobody_flags_anything(name, without_noise):
    outcome = rivals.METHODS[name](without_noise)
    assert (outcome.probabilities.argmax(1) != without_noise.given).mean() <= 0.01
    assert (outcome.doubt > 0.9).mean() <= 0.01
    ex = without_noise.examples
    assert (outcome.predict(ex.test_images).argmax(1) == ex.test_labels).mean() > 0.97


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in UNAWARE])
def test_two_classes_mixed_up_are_found_by_all_who_train_on_clean_examples(name, swapped):
    outcome, ex = rivals.METHODS[name](swapped), swapped.examples
    right = (outcome.probabilities.argmax(1) == ex.true_labels).mean()
    assert right > 0.9
    assert average_precision(outcome.doubt, ex.is_wrong) > 0.9


def test_average_precision_is_the_mean_precision_at_the_wrong_ones():
    doubt = np.array([0.9, 0.8, 0.7, 0.6])
    wrong = np.array([True, False, True, False])
    assert average_precision(doubt, wrong) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(doubt, np.zeros(4, bool)))


def test_a_results_page_has_a_column_for_each_noise_and_the_best_method_first():
    def row(noise, method, seed, error):
        return tables.Row("mnist5k", "cnn", noise, 100, method, seed, error, 0.9, 0.8, 0.7, 2, 3)

    rows = [row("class", "weights", 0, 0.3), row("class", "weights", 1, 0.1)]
    rows += [row("symmetric", "clean", 0, 0.02)]
    ((title, header, lines),) = tables.by_noise(rows)
    assert title == "mnist5k, cnn, 100 clean, 2 seeds"
    assert header[1:] == ["class 0.4", "symmetric 0.5", "trainings", "seconds"]
    assert lines == [
        ["clean", "", "2.00 %, 0.9000, 70.0 %", "2.00", "3"],
        ["weights", "20.00 ± 14.14 %, 0.9000, 70.0 %", "", "2.00", "3"],
    ]


def test_the_bench_writes_its_table_and_goes_on(tmp_path):
    said: list[str] = []
    choices = {"clean": "100", "noise": "instance:0.3", "model": "linear", "steps": "100"}
    options = Options("cleaning", ("weights", "clean"), tmp_path, choices=choices)
    rows = bench.run(options, said.append)
    assert [row.method for row in rows] == ["weights", "clean"]
    assert all(0 < row.test_error < 0.6 and row.wrong_label_auc > 0.6 for row in rows)
    # Written with six digits.
    assert read(tmp_path / "results.csv") == [row._replace(**_rounded(row)) for row in rows]
    assert "mnist5k, linear, instance 0.3, 100 clean" in (tmp_path / "bench.html").read_text()
    said.clear()
    assert bench.run(options, said.append)[0].method == "weights"
    assert not any(line.startswith("[") for line in said)  # nothing is run again


def test_a_file_of_ones_own_is_taken_whole_up_to_the_published_sizes(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (300, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(300) % 3)
    options = Options("cleaning", ("clean",), tmp_path)
    examples = _examples(options, str(tmp_path / "own.npz"), "class", 60, seed=0)
    parts = (examples.given_labels, examples.validation_labels, examples.test_labels)
    assert tuple(map(len, parts)) == (180, 60, 60)
    with pytest.raises(ConfigError, match="--clean=240.*has 240 training examples"):
        _examples(options, str(tmp_path / "own.npz"), "class", 240, seed=0)


def _rounded(row):
    return {
        name: float(f"{value:.6g}")
        for name, value in row._asdict().items()
        if isinstance(value, float)
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choices": {"noise": "symmetrical"}}, "--noise=symmetrical.*symmetric"),
        ({"choices": {"model": "cn"}}, "--model=cn.*cnn"),
        ({"choices": {"clean": "0"}}, "--clean=0"),
        ({"choices": {"steps": "many"}}, "--steps=many"),
        ({"choices": {"noise": ","}}, "--noise is empty"),
        ({"solvers": ("soba",)}, "--solvers"),
        ({"seconds": 3.0}, "--seconds: cleaning"),
        ({"task": "quadratics", "choices": {"clean": "5"}}, "--clean is an option of"),
    ],
)
def test_mistakes_are_named(options, words, tmp_path):
    asked = {"task": "cleaning", "solvers": None, "out": tmp_path} | options
    with pytest.raises(ConfigError, match=words):
        bench.run(Options(**asked), print)
