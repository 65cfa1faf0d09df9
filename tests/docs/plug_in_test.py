"""The plug-in examples: short, shown as they are, and forgiving of the usual mistakes."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel_flax as bf

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "plug_in"
PAGE = ROOT / "docs" / "plug_in.md"
LOOPS = ("linen", "nnx", "grain")


def difference(loop: str) -> list[str]:
    """The lines of a unified diff of the two files, without its head and without context."""
    before, after = (
        (FOLDER / f"{loop}_{when}.py").read_text().splitlines() for when in ("before", "after")
    )
    return list(difflib.unified_diff(before, after, "before", "after", lineterm="", n=1))[2:]


@pytest.mark.parametrize("loop", LOOPS)
def test_ten_lines_make_a_loop_bilevel(loop):
    lines = difference(loop)
    added = sum(line.startswith("+") for line in lines)
    removed = sum(line.startswith("-") for line in lines)
    assert 0 < added <= 10
    assert removed <= 10
    # Nothing squeezed: each line is one that the formatter leaves alone.
    assert all(len(line) <= 101 and ";" not in line for line in lines)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_page_shows_the_true_difference(loop):
    blocks = re.findall(r"```diff\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert "\n".join(difference(loop)) == blocks[LOOPS.index(loop)]


def test_the_difference_is_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "FOLDER", tmp_path)
    (tmp_path / "x_before.py").write_text("a\nb\n")
    (tmp_path / "x_after.py").write_text("a\nc\nd\n")
    assert [line for line in difference("x") if line[0] in "+-"] == ["-b", "+c", "+d"]


def run(loop: str, when: str, steps: int | None, capsys) -> list[float]:
    """What the program prints: the test error and, after, the AUC."""
    path = FOLDER / f"{loop}_{when}.py"
    source = path.read_text()
    assert len(re.findall(r"^STEPS = \d+$", source, re.MULTILINE)) == 1
    if steps is not None:
        source = re.sub(r"^STEPS = \d+$", f"STEPS = {steps}", source, flags=re.MULTILINE)
    exec(compile(source, str(path), "exec"), {"__name__": "__main__"})
    return [float(number) for number in re.findall(r"\d\.\d{3}", capsys.readouterr().out)]


@pytest.mark.parametrize("loop", ["nnx", "grain"])  # grain's network and solver are linen's
def test_the_loop_runs(loop, capsys):
    assert len(run(loop, "after", 2, capsys)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_ten_lines_help(loop, capsys):
    (before,) = run(loop, "before", None, capsys)
    after, auc = run(loop, "after", None, capsys)
    assert after < before
    assert auc > 0.95
    row = re.search(rf"^\| {loop} \|(.*)\|$", PAGE.read_text(), re.MULTILINE | re.IGNORECASE)
    assert row
    # Another JAX rounds otherwise: some four of the 397 test images.
    printed = [float(number) for number in row[1].split("|")]
    np.testing.assert_allclose([before, after, auc], printed, atol=0.0125)


# The usual mistakes: one clear line each.
train = {"image": np.ones((4, 3), np.float32), "label": np.array([0, 1, 0, 1])}
indexed = {**train, "index": np.arange(4)}
weights = bf.outer.sigmoid(4)


def losses(params, batch):
    logits = batch["image"] @ params
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


problem = bf.Problem(
    lambda z, x, batch: (weights.apply(x, batch) * losses(z, batch)).mean(),
    lambda z, x, batch: losses(z, batch).mean(),
    per_sample=True,
)
solver = bf.auto(problem, inner=optax.sgd(0.1), steps=10)
update = jax.jit(solver.update)


def step(inner, outer):
    return update(solver.init(jnp.zeros((3, 2)), weights.init()), bf.Batch(inner, outer))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 320
    return text


def test_an_index_is_missing():
    with pytest.raises(ValueError, match=r'need batch\["index"\]') as error:
        step(train, train)
    assert "['image', 'label']" in one_line(error)


@pytest.mark.parametrize("index", [np.arange(4)[:, None], np.arange(3)])
def test_an_index_of_another_shape(index):
    with pytest.raises(ValueError, match=r'batch\["index"\] has shape') as error:
        step({**train, "index": index}, train)
    assert "'label': 4" in one_line(error)


def test_an_entry_is_missing():
    without = {"image": train["image"]}
    with pytest.raises(ValueError, match=r'outer_loss reads batch\["label"\]') as error:
        step(indexed, without)
    assert "['image']" in one_line(error)
    with pytest.raises(ValueError, match=r'inner_loss reads batch\["label"\]'):
        step({**without, "index": np.arange(4)}, train)


def test_an_index_beyond_the_last_row():
    _, info = step(indexed, train)
    bf.check_finite(info)
    before = solver.init(jnp.zeros((3, 2)), weights.init())
    after, info = update(before, bf.Batch({**indexed, "index": np.arange(4) + 1}, train))
    with pytest.raises(
        FloatingPointError, match=r"step 7: not finite.*outside the n rows"
    ) as error:
        bf.check_finite(info, 7)
    one_line(error)
    np.testing.assert_array_equal(after.outer_params, before.outer_params)


def test_an_nnx_module_where_arrays_belong():
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for params in (module, {"net": module}, nnx.state(module)):
        with pytest.raises(TypeError, match="inner_params holds the NNX .*bf.nnx.problem") as error:
            solver.init(params, weights.init())
        one_line(error)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(images))


@pytest.mark.parametrize(
    "make",
    [bf.soba, functools.partial(bf.stocbio, inner_steps=2, adjoint_steps=2, adjoint_step=0.1)],
)
def test_model_state_is_missing(make):
    net = Normed()

    def loss(train, params, batch, model_state):
        variables = {"params": params, **model_state}
        logits, new = net.apply(variables, batch["image"], train=train, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]), new

    def inner_loss(params, x, batch, model_state, rng):
        values, new = loss(True, params, batch, model_state)
        return (weights.apply(x, batch) * values).mean(), bf.Aux(dict(new))

    def outer_loss(params, x, batch, model_state, rng):
        return loss(False, params, batch, model_state)[0].mean(), bf.Aux()

    stateful = bf.Problem(inner_loss, outer_loss, stateful=True, per_sample=True)
    normed = make(stateful, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    update = jax.jit(normed.update)
    variables = net.init(jax.random.key(0), train["image"], train=False)
    many = lambda tree, count: jax.tree.map(lambda leaf: np.stack([leaf] * count), tree)
    batch = bf.Batch(indexed, train)
    if normed.batches != (1, 1):
        batch = bf.Batch(many(indexed, normed.batches[0]), many(train, normed.batches[1]))
    with pytest.raises(ValueError, match="given {}: pass solver.init.*model_state") as error:
        update(normed.init(variables["params"], weights.init()), batch)
    one_line(error)
    stats = {"batch_stats": variables["batch_stats"]}
    update(normed.init(variables["params"], weights.init(), model_state=stats), batch)
