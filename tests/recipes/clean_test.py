"""`recipes.clean` on closed cases, from any source, for any kind of module."""

import flax.linen as nn
import grain
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel_flax as bf
from bilevel_flax.recipes import noise_model, sources
from bilevel_flax.recipes.networks import as_network
from bilevel_flax.recipes.training import Trainer

CLASSES = 4


class Mlp(nn.Module):
    """With BatchNorm and dropout, under the names that Linen modules use."""

    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.relu(nn.BatchNorm(use_running_average=deterministic)(nn.Dense(16)(x)))
        return nn.Dense(CLASSES)(nn.Dropout(0.1, deterministic=deterministic)(x))


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(CLASSES, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.last = nnx.Linear(16, CLASSES, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def blobs(n, seed=0, apart=4.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    inputs = rng.normal(size=(n, CLASSES)) + apart * np.eye(CLASSES)[labels]
    return inputs.astype(np.float32), labels


X, TRUE = blobs(600)
CLEAN = blobs(40, seed=1)
TEST = blobs(400, seed=2)


def run(given, model=None, clean=CLEAN, train=None, **settings):
    source = (X, given) if train is None else train
    settings = {"steps": 300, "inputs": "image", "optimizer": optax.adam(1e-2)} | settings
    return bf.recipes.clean(model or Mlp(), source, clean, **settings)


@pytest.fixture(scope="module")
def swapped():
    """All labels of classes 0 and 1 exchanged in six of ten examples: the majority is wrong."""
    rng = np.random.default_rng(3)
    wrong = (TRUE < 2) & (rng.random(len(TRUE)) < 0.4)
    given = np.where(wrong, 1 - TRUE, TRUE).astype(np.int32)
    return wrong, given, run(given)


def test_labels_that_are_all_right_are_left_alone():
    cleaned = run(TRUE)
    assert (cleaned.wrong_probability > 0.5).mean() < 0.01
    assert (cleaned.suggested_label == TRUE).mean() > 0.99
    assert np.diag(cleaned.confusion).min() > 0.97


def test_a_network_that_is_mostly_wrong_does_not_overrule_right_labels():
    rng = np.random.default_rng(5)
    inputs, true = blobs(600, seed=5, apart=0.3)
    given = np.where(rng.random(600) < 0.3, rng.integers(0, CLASSES, 600), true).astype(np.int32)
    known = blobs(40, seed=6, apart=0.3)
    cleaned = run(given, train=(inputs, given), clean=known)
    assert (cleaned.predict(inputs).argmax(1) == true).mean() < 0.6
    assert (cleaned.suggested_label == true).mean() > (given == true).mean() - 0.05
    assert "suggested labels are mostly the given ones" in cleaned.report()


def test_where_classes_overlap_a_few_wrong_labels_are_not_made_more():
    rng = np.random.default_rng(7)
    inputs, true = blobs(6000, seed=7, apart=1.6)
    given = np.where(rng.random(6000) < 0.05, rng.integers(0, CLASSES, 6000), true).astype(np.int32)
    settings = {"steps": 600, "optimizer": optax.adam(3e-3)}
    cleaned = run(given, train=(inputs, given), clean=blobs(40, seed=8, apart=1.6), **settings)
    network = (cleaned.predict(inputs).argmax(1) == true).mean()
    assert 0.7 < network < 0.8  # nothing is much better: of the given labels 96 % are right
    assert (cleaned.suggested_label == true).mean() > network + 0.1
    assert "suggested labels are mostly the given ones" in cleaned.report()


def test_a_network_in_doubt_is_not_taken_for_noise():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 3000)
    evidence = np.exp(rng.normal(size=(3000, 3)) + 1.5 * np.eye(3)[true])
    said = evidence / evidence.sum(1, keepdims=True)
    said = said**1.5 / (said**1.5).sum(1, keepdims=True)  # what Bayes' rule makes of the evidence
    matrix = np.array([[0.6, 0.4, 0.0], [0.1, 0.8, 0.1], [0.0, 0.3, 0.7]])
    given = (rng.random((3000, 1)) > matrix[true].cumsum(1)).sum(1)
    assert np.abs(noise_model.likeliest(said, given) - matrix).max() < 0.08
    assert np.abs(noise_model.confusion(said, given) - matrix).max() > 0.1


def test_two_classes_that_are_mixed_up_are_told_apart(swapped):
    wrong, _, cleaned = swapped
    assert ((cleaned.wrong_probability > 0.5) == wrong).mean() > 0.97
    assert (cleaned.suggested_label == TRUE).mean() > 0.97
    at_top = cleaned.suspicious
    assert wrong[at_top.index[: wrong.sum() // 2]].all()
    assert (np.diff(at_top.probability) <= 0).all()
    assert (cleaned.predict(TEST[0]).argmax(1) == TEST[1]).mean() > 0.97
    # The matrix: a share of classes 0 and 1 goes to the other, nothing else goes anywhere.
    share = wrong.sum() / (TRUE < 2).sum()
    expected = np.eye(CLASSES)
    expected[:2, :2] = [[1 - share, share], [share, 1 - share]]
    np.testing.assert_allclose(cleaned.confusion, expected, atol=0.08)


def test_what_it_costs_and_says(swapped):
    wrong, _, cleaned = swapped
    # Of 300 steps: 1.25 in the first training, half of it again for its pilot, .5 + 1 + .5, and
    # looks at the held-out labels.
    assert 3.875 < cleaned.plain_step_equivalents < 3.95
    report = cleaned.report()
    assert "600 labels" in report
    assert f"{cleaned.plain_step_equivalents:.2f} plain trainings" in report
    assert cleaned.wrong_probability.sum() == pytest.approx(wrong.sum(), rel=0.1)


def test_parts_are_on_one_half_and_on_the_other_in_turn(swapped, monkeypatch):
    """So that a label is judged by a network that was not taught it last."""
    pools, fit = [], Trainer.fit

    def recorded(self, rows, *args, **settings):
        pools.append(set(rows[rows < len(X)].tolist()))  # the rest are clean
        return fit(self, rows, *args, **settings)

    monkeypatch.setattr(Trainer, "fit", recorded)
    run(swapped[1])
    _, first, second, third, last = pools  # after the second network
    assert min(map(len, pools)) > 200
    assert not first & second and not second & third
    assert len(first & third) > 200
    assert len(last & (first | third)) > 200 and len(last & second) > 200


def test_columns_come_back(swapped):
    _, given, cleaned = swapped
    columns = cleaned.add_columns({"image": X, "label": given})
    assert set(columns) == {"image", "label", "wrong_probability", "suggested_label"}
    with pytest.raises(ValueError, match="600: pass the one"):
        cleaned.add_columns({"label": given[:5]})


def test_the_same_from_an_nnx_module_and_grain(swapped):
    wrong, given, _ = swapped
    rows = [{"image": x, "label": int(y)} for x, y in zip(X, given, strict=True)]
    rows = grain.MapDataset.source(rows)
    cleaned = run(given, NnxMlp(nnx.Rngs(0)), train=rows)
    assert ((cleaned.wrong_probability > 0.5) == wrong).mean() > 0.97


def test_what_the_network_never_saw_is_no_prediction(swapped):
    _, _, cleaned = swapped
    assert cleaned.predict(X[:0]).shape == (0, CLASSES)
    for inputs, words in (
        (X[0], r"shape \[4\], predict of \[\]"),
        (X.astype(int), "scale both alike"),
    ):
        with pytest.raises(ValueError, match=words):
            cleaned.predict(inputs)


def test_an_example_that_stands_on_both_sides_is_judged_by_its_clean_label_with_a_warning():
    both = np.concatenate([X, CLEAN[0][:3]])
    wrong_there = np.append(TRUE, (CLEAN[1][:3] + 1) % CLASSES).astype(np.int32)
    # Clean examples that contradict each other decide nothing; of another precision they are the
    # same all the same.
    clean = np.concatenate([CLEAN[0], X[:1], X[:1]]).astype(np.float64)
    labels = np.concatenate([CLEAN[1], (TRUE[:1] + 1) % CLASSES, TRUE[:1]])
    with pytest.warns(UserWarning) as warned:
        cleaned = run(None, train={"image": both, "label": wrong_there}, clean=(clean, labels))
    first, second = (str(warning.message) for warning in warned if "clean" in str(warning.message))
    assert first.startswith("1 examples of clean") and "clean[41]" in first
    assert second.startswith("3 training examples also stand in clean")
    assert cleaned.wrong_probability[0] < 0.5
    assert cleaned.wrong_probability[-3:].tolist() == [1, 1, 1]
    assert cleaned.suggested_label[-3:].tolist() == CLEAN[1][:3].tolist()
    assert "also stand in clean" in cleaned.report()


def with_nan(inputs):
    inputs = inputs.copy()
    inputs[3, 0] = np.nan
    return inputs


MISTAKES = {
    "a class without clean examples": (
        lambda: run(TRUE, clean=(CLEAN[0][CLEAN[1] > 0], CLEAN[1][CLEAN[1] > 0])),
        "clean has no example of class 0",
    ),
    "a class of clean only": (
        lambda: run(TRUE, clean=(CLEAN[0], CLEAN[1] + np.int32(1) * (CLEAN[1] == 3))),
        "clean has no example of class 3",
    ),
    "other inputs": (lambda: run(TRUE, clean=(CLEAN[0][:, :2], CLEAN[1])), r"clean of \[2\]"),
    "one-hot labels": (lambda: run(np.eye(4)[TRUE]), "train's labels must be integers"),
    "a negative label": (lambda: run(TRUE - 1), "train's labels.*-1, out of range"),
    "lengths": (lambda: run(TRUE[:-1]), "600 inputs and 599 labels"),
    "another key": (
        lambda: run(None, train={"pixels": X, "label": TRUE}),
        'train has no "image", it has .*inputs=',
    ),
    "no examples": (lambda: run(None, train=(X[:0], TRUE[:0])), "train has no examples"),
    "a path": (lambda: run(None, train="data.csv"), "train is str|train holds str"),
    "a class, not a module": (lambda: run(TRUE, Mlp), "the class Mlp is no classifier"),
    "a step, not an optimiser": (lambda: run(TRUE, optimizer=0.1), "optimizer=optax.sgd"),
    "bytes beside numbers": (
        lambda: run(TRUE, clean=(CLEAN[0].astype(np.uint8), CLEAN[1])),
        "train has inputs of float32, clean of uint8: scale both alike",
    ),
    "a hole": (lambda: run(None, train=(with_nan(X), TRUE)), "has 1 rows .*not finite.* at 3"),
    "words": (lambda: run(None, train=(TRUE.astype(str), TRUE)), "must hold real numbers, got <U"),
    "complex numbers": (lambda: run(None, train=(X * 1j, TRUE)), "real numbers, got complex64"),
    "names of classes": (lambda: run(TRUE.astype(str)), "integers.*pass class numbers"),
    "a label that is no int32": (
        lambda: run(np.where(np.arange(600) == 5, 2**33, TRUE.astype(np.int64))),
        r"train's labels\[5\] is 8589934592, out of range",
    ),
    "a label for what is ignored": (
        lambda: run(np.where(np.arange(600) == 5, 255, TRUE)),
        r"class 4, 5, 6, 7, 8 ... \(252 in all\), and labels go up to 255",
    ),
    "nothing to judge": (lambda: run(None, train=CLEAN), "every training example also stands in"),
    "rows without labels": (
        lambda: run(None, train=[{"image": row} for row in X]),
        "train has no \"label\", it has 'image'",
    ),
    "fewer logits": (
        lambda: run(TRUE, nn.Dense(2)),
        r"model returns \[2, 2\] .* 0 to 3.*\[batch, 4\]",
    ),
    "an optimiser without its step": (
        lambda: run(TRUE, optimizer=optax.adam),
        r"optimizer=<function adam.*call it",
    ),
    "a penalty that is a number": (lambda: run(TRUE, penalty=0.1), "penalty=0.1 is no function"),
    "a seed below 0": (lambda: run(TRUE, seed=-1), "seed must be a non-negative integer, got -1"),
    "no steps": (lambda: bf.recipes.clean(Mlp(), (X, TRUE), CLEAN, steps=0), "steps must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(mistake):
    attempt, words = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=words) as error:
        attempt()
    assert "\n" not in str(error.value)


def test_a_step_that_is_too_large_is_named():
    with pytest.raises(FloatingPointError, match="pass optimizer="):
        run(TRUE, optimizer=optax.sgd(1e30))


def test_the_posterior_is_bayes_rule():
    rng = np.random.default_rng(0)
    p, given = rng.dirichlet(np.ones(3), 50), rng.integers(0, 3, 50)
    matrix = rng.dirichlet(np.ones(3), 3)
    joint = p * matrix[:, given].T
    expected = joint / joint.sum(1, keepdims=True)
    np.testing.assert_allclose(noise_model.posterior(p, given, matrix, 0.0), expected, rtol=1e-9)
    # With resemblance the likelihoods of the labels other than the true one still sum to theirs.
    likelihood = np.stack([noise_model.posterior(p, np.full(50, y), matrix, 1.3) for y in range(3)])
    assert likelihood.min() >= 0
    np.testing.assert_allclose(likelihood.sum(-1), 1.0)


def test_resemblance_is_estimated():
    rng = np.random.default_rng(0)
    n, classes = 6000, 5
    p = rng.dirichlet(np.full(classes, 0.5), n)
    held = p.argmax(1)
    matrix = 0.6 * np.eye(classes) + 0.1 * (1 - np.eye(classes))
    for gamma in (0.0, 0.5, 1.0):
        pull = p**gamma * (np.arange(classes) != held[:, None])
        given = np.array([rng.choice(classes, p=row / row.sum()) for row in pull])
        assert noise_model.resemblance(p, given, matrix) == pytest.approx(gamma, abs=0.11)
    assert noise_model.resemblance(p[:0], held[:0], matrix) == 0.0


def test_sources_read_the_same_arrays():
    class Rows:  # as a TFDS data source or a Grain MapDataset
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return {"image": X[i], "label": TRUE[i]}

    class Columns(Rows):  # as a Hugging Face Dataset
        column_names = ("image", "label", "other")

        def __getitem__(self, name):
            return {"image": X[:5].tolist(), "label": TRUE[:5].tolist()}[name]

    for source in ((X[:5], TRUE[:5]), {"image": X[:5], "label": TRUE[:5]}, Rows(), Columns()):
        inputs, labels = sources.read("train", source, "image", "label")
        np.testing.assert_allclose(inputs, X[:5])
        assert labels.tolist() == TRUE[:5].tolist()


def test_two_functions_are_a_network():
    network = as_network(Mlp())
    again = as_network((network.init, network.apply))
    assert again == network
