"""The space in which DARTS collapses: what is computed, what is kept, what is selected."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bilevel_flax import data
from examples.darts.collapse import search, space
from examples.darts.collapse import table as tables
from examples.darts.collapse.space import CONVOLUTION, SKIP
from examples.darts.micro.data import Digits

RNG = np.random.default_rng(0)


def test_a_product_of_pixels_is_the_convolution():
    images = jnp.asarray(RNG.normal(size=(3, 7, 6, 2)), jnp.float32)
    kernels = jnp.asarray(RNG.normal(size=(2, 3, 3, 2, 4)), jnp.float32)
    for stride in (1, 2):
        made = space.convolved(images, kernels, stride)
        for number, kernel in enumerate(kernels):
            expected = lax.conv_general_dilated(
                images,
                kernel,
                (stride, stride),
                [(1, 1), (1, 1)],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            np.testing.assert_allclose(made[:, number], expected, atol=1e-5)


def test_a_network_of_skips_uses_no_kernel_of_an_edge_and_one_of_convolutions_all():
    images = jnp.asarray(RNG.normal(size=(4, 7, 7, 1)), jnp.float32)
    batch = {"image": images, "label": jnp.arange(4)}
    z = jax.jit(space.init)(jax.random.key(0))
    gradient = jax.jit(jax.grad(space.cross_entropy))
    for name, used in ((SKIP, 0), (CONVOLUTION, 6)):
        kernels = gradient(z, space.one_hot((name,) * 6), batch)["edges"]
        assert (np.abs(kernels).max((1, 2, 3, 4)) > 1e-6).sum() == used


def test_half_of_the_edges_without_parameters_is_a_collapse():
    assert len(set(space.genotypes())) == 64
    for skips in range(7):
        genotype = (SKIP,) * skips + (CONVOLUTION,) * (6 - skips)
        assert space.collapsed(genotype) == (skips >= 3)


def test_a_table_is_resumed_and_another_refused(tmp_path):
    table = tables.TABLE._replace(seeds=1)
    path, calls = tmp_path / "table.csv", []

    def stopped(genotype, seed):
        if len(calls) == 5:
            raise RuntimeError("stopped")
        calls.append(genotype)
        return 0.5

    with pytest.raises(RuntimeError, match="stopped"):
        table.complete(stopped, path, lambda line: None)
    later = []
    done = table.complete(
        lambda genotype, seed: later.append(genotype) or 0.25, path, lambda line: None
    )
    assert calls + later == space.genotypes()
    assert done[:, 0].tolist() == [0.5] * 5 + [0.25] * 59
    np.testing.assert_array_equal(table.read(path), done)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of this space; delete it"):
        table.read(path)


def test_the_committed_table_is_complete_and_its_best_network_has_not_collapsed():
    table = tables.read()
    assert table.shape == (64, tables.SEEDS) and not np.isnan(table).any()
    best = space.genotypes()[int(table.mean(1).argmax())]
    assert not space.collapsed(best)
    assert table.mean(1).argmin() == space.genotypes().index((SKIP,) * 6)


@pytest.fixture(scope="module")
def sides():
    """Noise with labels: 8 digits for each loss, in minibatches of 4."""
    images = RNG.normal(size=(16, 7, 7, 1)).astype(np.float32)
    label = np.arange(16, dtype=np.int32) % 10
    parts = (slice(0, 8), slice(8, 16))
    inner, outer = (data.partition({"image": images[p], "label": label[p]}, 4) for p in parts)
    return inner, outer


def test_the_curvature_is_the_hessians_largest_eigenvalue(sides):
    batch = jax.tree.map(lambda leaf: leaf[0], sides[1].batches)
    z = space.init(jax.random.key(0))
    logits = jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)
    loss = lambda x: space.cross_entropy(z, jax.nn.softmax(x.reshape(6, 2)), batch)
    whole = np.linalg.eigvalsh(jax.jit(jax.hessian(loss))(logits.reshape(-1)))
    # Along the six directions that a softmax does not see it is 0.
    assert float(search.curvature(z, logits, batch)) == pytest.approx(whole[whole != 0][-1], 1e-3)


def test_a_search_is_selected_from_in_four_ways_at_what_each_costs(sides, monkeypatch):
    monkeypatch.setattr(search, "RECORDS", 2)
    records = search.Searcher("darts1", budget=8)(sides, 0)
    assert records.weights.shape == (2, 6, 2) and records.curvature.shape == (2,)
    np.testing.assert_allclose(records.weights.sum(-1), 1, rtol=1e-6)
    records = records._replace(
        weights=np.stack([np.tile([0.9, 0.1], (6, 1)), np.tile([0.1, 0.9], (6, 1))]),
        curvature=np.array([1.0, 9.0]),
    )
    monkeypatch.setattr(search.selection, "stop_before_rise", lambda signal, window: 0)
    strongest, early, perturbed, alone = search.select("darts1", records, sides)
    assert strongest.genotype == (CONVOLUTION,) * 6 and early.genotype == (SKIP,) * 6
    assert strongest.units == search.BUDGET
    assert early.units == search.BUDGET / 2 + 2 * 6  # six products on F's two minibatches
    judged = 12 * 2 / 3  # without each operation, forward, on F's two minibatches
    assert perturbed.units == pytest.approx(search.BUDGET + 5 * search.SETTLE_STEPS + judged)
    assert alone.units == pytest.approx(search.BUDGET + judged)
    assert [one.selection for one in (strongest, early, perturbed, alone)] == list(
        search.SELECTIONS
    )


def test_the_digits_of_a_training_are_drawn_by_its_seed_alone(monkeypatch):
    drawn = []
    monkeypatch.setattr(jax, "jit", lambda function: lambda *args: drawn.append(args[2]) or 0)
    digits = Digits(np.zeros((600, 7, 7, 1), np.float32), np.arange(600, dtype=np.int32) % 10)
    digits.image[:, 0, 0, 0] = np.arange(600)
    trainer = tables.make_trainer(digits, digits)
    for genotype, seed in (((SKIP,) * 6, 0), ((CONVOLUTION,) * 6, 0), ((SKIP,) * 6, 1)):
        trainer(genotype, seed)
    one, other, third = (examples["image"][:, 0, 0, 0] for examples in drawn)
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(one)) == tables.EXAMPLES and not np.array_equal(one, third)
