"""Cells while they are searched for, and as they are derived: values, shapes, counts, cost."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.train.config import ConfigError, load
from bilevel_flax.train.experiment import train_and_evaluate
from bilevel_flax.train.step_runner import StepRunner
from examples.darts import augment, genotype, training
from examples.darts.cells import (
    CONVOLUTIONS,
    SEPARABLE,
    edge_kernels,
    mixed,
    normalized,
    quarters,
)
from examples.darts.depthwise import depthwise
from examples.darts.derived import DerivedNetwork, dropped
from examples.darts.genotype import OPERATIONS, Genotype
from examples.darts.network import SearchNetwork, Stem, make_stack, search_parameters
from examples.darts.optimizers import make_optimizer
from examples.darts.pooling import average_pool, max_pool
from examples.darts.task import MIXTURE

RNG = np.random.default_rng(0)
EDGES, CHANNELS = 2, 4
IMAGES = jnp.asarray(RNG.normal(size=(3, 5, 6, CHANNELS)), jnp.float32)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


KERNELS = {  # of 2 states with EDGES edges each
    "first_depthwise_3": random(2 * EDGES, 2, 3, 3, CHANNELS),
    "first_depthwise_5": random(2 * EDGES, 2, 5, 5, CHANNELS),
    "first_pointwise": random(2 * EDGES, 4, CHANNELS, CHANNELS),
    "second_depthwise_3": random(2 * EDGES, 1, 3, 3, CHANNELS),
    "second_depthwise_5": random(2 * EDGES, 1, 5, 5, CHANNELS),
    "second_pointwise": random(2 * EDGES, 2, CHANNELS, CHANNELS),
    "skip": random(2 * EDGES, 2, CHANNELS, CHANNELS // 2),
}


def convolved(images, kernel, stride, dilation):
    """`lax.conv`, one kernel [size, size, channels]."""
    reach = kernel.shape[0] // 2 * dilation
    return lax.conv_general_dilated(
        images,
        kernel[:, :, None],
        (stride, stride),
        [(reach, reach)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=kernel.shape[-1],
    )


def one_operation(kernels, name: str, edge: int, images, stride: int):
    """An operation as the paper writes it, on its own."""
    if name == "none":
        return jnp.zeros_like(images[:, ::stride, ::stride])
    if name == "max_pool_3x3":
        return normalized(max_pool(images, stride))
    if name == "avg_pool_3x3":
        return normalized(average_pool(images, stride))
    if name == "skip_connect":
        if stride == 1:
            return images
        parts = quarters(jax.nn.relu(images))
        halves = [part @ kernels["skip"][edge, i] for i, part in enumerate(parts)]
        return normalized(jnp.concatenate(halves, -1))
    size, dilation = CONVOLUTIONS[name]
    place = list(CONVOLUTIONS).index(name)
    kernel = kernels[f"first_depthwise_{size}"][edge, int(dilation == 2)]
    found = convolved(jax.nn.relu(images), kernel, stride, dilation)
    found = normalized(found @ kernels["first_pointwise"][edge, place])
    if name in SEPARABLE:
        kernel = kernels[f"second_depthwise_{size}"][edge, 0]
        found = convolved(jax.nn.relu(found), kernel, 1, 1)
        found = normalized(found @ kernels["second_pointwise"][edge, place])
    return found


@pytest.mark.parametrize(
    ("stride", "as_matrix"),
    [
        (2, True),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
    ],
)
def test_a_mixed_operation_is_the_weighted_sum_of_the_operations(stride, as_matrix):
    weights = jax.nn.softmax(random(2, EDGES, len(OPERATIONS)))
    states = jnp.stack([IMAGES, random(*IMAGES.shape)])

    @jax.jit
    def found(states, kernels):
        by_state = jax.tree.map(lambda k: k.reshape(2, EDGES, *k.shape[1:]), edge_kernels(kernels))
        return mixed(states, weights, by_state, stride, as_matrix)

    @jax.jit
    def wanted(states, kernels):
        edge = lambda state, number: sum(
            weights[state, number, i]
            * one_operation(kernels, name, EDGES * state + number, states[state], stride)
            for i, name in enumerate(OPERATIONS)
        )
        return jnp.stack([jnp.stack([edge(s, e) for e in range(EDGES)]) for s in range(2)])

    np.testing.assert_allclose(found(states, KERNELS), wanted(states, KERNELS), atol=3e-5)


def test_a_search_network_is_its_cells_one_by_one():
    """A run of two normal cells from the stem, a reduction, and a cell that sees larger images."""
    stack = make_stack(5, width=2, cells=4, reductions=(2,))
    network = SearchNetwork(stack, num_classes=3, as_matrix=False)
    z = search_parameters(network, jax.random.key(0), (5, 5, 3))
    shares = {name: jax.nn.softmax(random(14, 8)) for name in ("normal", "reduce")}
    images = random(2, 5, 5, 3)
    before = last = jnp.asarray(Stem(stack).apply({"params": z["stem"]}, images))
    halved = False
    for number, reduce in enumerate(stack.reductions):
        kernels, stride = z[f"cell_{number}"], 2 if reduce else 1
        parts = quarters(jax.nn.relu(before)) if halved else (jax.nn.relu(before),)
        into = [part @ kernels["compress_0"][f"kernel_{i}"] for i, part in enumerate(parts)]
        into = [jnp.concatenate(into, -1), jax.nn.relu(last) @ kernels["compress_1"]["kernel_0"]]
        states, weights = (
            [normalized(state) for state in into],
            shares["reduce" if reduce else "normal"],
        )
        for node in range(2, 6):
            edges = [
                weights[genotype.EDGES.index((start, node)), i]
                * one_operation(
                    kernels,
                    name,
                    sorted(genotype.EDGES).index((start, node)),
                    states[start],
                    stride if start < 2 else 1,
                )
                for start in range(node)
                for i, name in enumerate(OPERATIONS)
            ]
            states.append(jnp.asarray(sum(edges)))
        before, last, halved = last, jnp.concatenate(states[2:], -1), reduce
    wanted = last.mean((1, 2)) @ z["classifier"]["kernel"] + z["classifier"]["bias"][None]
    found = jax.jit(network.apply)({"params": z}, images, shares)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_depthwise_convolutions_agree_on_images_of_their_own():
    images = random(EDGES, 3, 5, 6, CHANNELS)
    kernels = [random(EDGES, count, size, size, CHANNELS) for count, size in ((1, 3), (2, 5))]
    found = [depthwise(images, kernels, (2, 1), 2, as_matrix) for as_matrix in (True, False)]
    assert found[0].shape == (EDGES, 3, 3, 3, 3, CHANNELS)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_leave_out_what_is_outside(stride):
    images = np.asarray(IMAGES)
    for pool, take in ((max_pool, np.max), (average_pool, np.mean)):
        wanted = [
            [
                take(images[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2], axis=(1, 2))
                for j in range(0, 6, stride)
            ]
            for i in range(0, 5, stride)
        ]
        wanted = np.array(wanted).transpose(2, 0, 1, 3)
        np.testing.assert_allclose(pool(IMAGES, stride), wanted, rtol=1e-5, atol=1e-6)


def test_normalised_channels_have_mean_0_and_variance_1_whatever_their_scale():
    found = np.asarray(normalized(100 * IMAGES + 7))
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(found.var((0, 1, 2)), 1, atol=1e-3)


def test_normalisations_own_rule_is_the_derivative_also_the_second():
    def plain(images):
        centred = images - images.mean((0, 1, 2), keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean((0, 1, 2), keepdims=True) + 1e-5)

    weights, tangent = random(*IMAGES.shape), random(*IMAGES.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(normalise, images):
        loss = lambda images: jnp.sum(weights * normalise(images) ** 3)
        return jax.jvp(jax.value_and_grad(loss), (images,), (tangent,))

    for found, wanted in zip(
        jax.tree.leaves(derivatives(normalized, IMAGES)),
        jax.tree.leaves(derivatives(plain, IMAGES)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


CELL = (
    (("sep_conv_3x3", 0), ("skip_connect", 1)),
    (("dil_conv_5x5", 0), ("max_pool_3x3", 2)),
    (("sep_conv_5x5", 1), ("avg_pool_3x3", 3)),
    (("dil_conv_3x3", 2), ("skip_connect", 0)),
)
NORMAL_AND_REDUCE = Genotype(CELL, CELL)


def by_hand(c_before: int, c_last: int, c: int, skips: int) -> int:
    """Parameters of CELL: two 1x1 convolutions in, its operations, BatchNorm 2 a channel."""
    into = (c_before * c + 2 * c) + (c_last * c + 2 * c)
    separable = lambda size: 2 * (size**2 * c + c * c + 2 * c)
    dilated = lambda size: size**2 * c + c * c + 2 * c
    halvings = skips * (2 * c * (c // 2) + 2 * c)
    return into + separable(3) + separable(5) + dilated(3) + dilated(5) + halvings


def test_parameters_of_a_derived_network_as_counted_by_hand():
    stack = make_stack(28, width=6, cells=3, reductions=(1,), stem_stride=2)
    network = DerivedNetwork(NORMAL_AND_REDUCE, stack, num_classes=10, auxiliary=True)
    stem = 9 * 1 * 18 + 2 * 18
    first = by_hand(18, 18, 6, skips=0)
    second = by_hand(18, 24, 12, skips=2)  # both skips come from the inputs, at stride 2
    third = by_hand(24, 48, 12, skips=0)
    classifier = 48 * 10 + 10
    found = training.count_parameters(network, (28, 28, 1))
    assert found == stem + first + second + third + classifier


@pytest.mark.slow
@pytest.mark.parametrize("size", [28, 25])
def test_shapes_of_derived_and_search_networks(size):
    stack = make_stack(size, width=4, cells=4, stem_stride=4)
    assert stack.channels == (4, 8, 16, 16)
    derived = DerivedNetwork(NORMAL_AND_REDUCE, stack, num_classes=7, auxiliary=True)
    variables = training.shapes_of(derived, (size, size, 3))
    images = jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32)
    logits, extra = jax.eval_shape(lambda v, x: derived.apply(v, x, train=False), variables, images)
    assert logits.shape == extra.shape == (5, 7)
    search = SearchNetwork(stack, num_classes=7)
    weights = jax.eval_shape(lambda: MIXTURE.weights(MIXTURE.init(jax.random.key(0))))
    z = jax.eval_shape(lambda: search_parameters(search, jax.random.key(0), (size, size, 3)))
    out = jax.eval_shape(lambda z, x, w: search.apply({"params": z}, x, w), z, images, weights)
    assert out.shape == (5, 7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 8}, "images of 8x8 are too small for 2 reductions and a stem of stride 2"),
        ({"width": 5}, "config.network.width=5: must be even"),
        ({"cells": 0, "reductions": ()}, "config.network.cells=0"),
        ({"reductions": (4,)}, "config.network.reductions=(4,): must be cells, from 0 to 3"),
        ({"stem_stride": 3}, "config.network.stem_stride=3"),
    ],
)
def test_bad_stacks_are_refused(change, says):
    fine = {"image_size": 9, "width": 4, "cells": 4, "reductions": (1, 2), "stem_stride": 2}
    make_stack(**fine)
    with pytest.raises(ConfigError, match=re.escape(says)):
        make_stack(**(fine | change))


def test_drop_path_leaves_out_examples_as_a_whole_and_keeps_the_mean():
    found = np.asarray(dropped(jax.random.key(0), jnp.ones((4000, 2, 2, 3)), 0.3))
    per_example = found.reshape(4000, -1)
    assert (per_example == per_example[:, :1]).all()
    gone = (per_example[:, 0] == 0).mean()
    assert abs(gone - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    np.testing.assert_allclose(per_example[per_example > 0], 1 / 0.7, rtol=1e-6)


@pytest.mark.slow
def test_cutout_is_one_square_and_reaches_over_the_edge():
    side, count, size = 4, 500, 10
    found = np.asarray(augment.cut_out(jax.random.key(0), jnp.ones((count, size, size, 2)), side))
    gone = found[..., 0] == 0
    assert (gone == (found[..., 1] == 0)).all()
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert (gone.sum((1, 2)) == rows * columns).all()
    assert rows.max() == columns.max() == side
    assert rows.min() < side  # a corner of it is outside now and then
    # A length of 2, 3, 4 ... 4, 3: the first is at -2 .. 7, each as often.
    expected = np.mean([min(first + side, size) - max(first, 0) for first in range(-2, 8)])
    assert abs(rows.mean() - expected) < 0.15


@pytest.mark.slow
def test_shifts_and_mirrors_move_images_and_nothing_else():
    image = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    images = jnp.tile(image, (200, 1, 1, 1))
    moved = np.asarray(augment.shifted(jax.random.key(0), images, 1))[..., 0]
    padded = np.pad(np.asarray(image)[0, ..., 0], 1)
    crops = {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
    assert {one.tobytes() for one in moved} == crops
    turned = np.asarray(augment.mirrored(jax.random.key(1), images))
    same = (turned == np.asarray(images)).all((1, 2, 3))
    flipped = (turned == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ flipped).all()
    assert 70 < flipped.sum() < 130


def tiny_search(count=lambda: None):
    """(problem, solver, state) of a tiny space: one cell, so one block of logits."""
    stack = make_stack(4, width=2, cells=1, reductions=())
    network = SearchNetwork(stack, num_classes=3)

    def loss(z, x, batch):
        count()
        logits = jnp.asarray(
            network.apply({"params": z}, batch["image"], {"normal": jax.nn.softmax(x)})
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    problem = bf.Problem(loss, loss)
    solver = bf.auto(problem, inner=make_optimizer(0.1, 100), steps=100)
    z = search_parameters(network, jax.random.key(0), (4, 4, 1))
    return problem, solver, solver.init(z, jnp.zeros((14, 8)))


def examples(seed: int, count: int) -> dict[str, np.ndarray]:
    images = np.random.default_rng(seed).normal(size=(count, 4, 4, 1)).astype(np.float32)
    return {"image": images, "label": np.arange(count, dtype=np.int32) % 3}


def test_a_search_step_costs_four_gradients():
    problem, solver, state = tiny_search()
    batch = bf.Batch(examples(1, 4), examples(2, 4), jnp.int32(0), jnp.int32(0))
    gradient = jax.jit(jax.grad(problem.inner_loss)).lower(*state.variables[::2], batch.inner)
    step = jax.jit(solver.update).lower(state, batch)
    # Before optimisation: the CPU's compiled count leaves library products out.
    costs = [lowered.cost_analysis() for lowered in (gradient, step)]
    flops = [cost["flops"] for cost in costs if cost is not None]
    assert flops[1] <= 4.05 * flops[0]


@pytest.mark.slow
def test_a_search_is_traced_once():
    calls = []
    _, solver, state = tiny_search(lambda: calls.append(1))
    sides = [data.partition(examples(seed, 12), 4) for seed in (1, 2)]
    loop = StepRunner(solver, *sides)
    state, _ = loop.run(state, 0, 1)
    traced = len(calls)
    step = int(state.step)
    while step < 30:
        state, info = loop.run(state, step, 30)
        step += len(info.inner_loss)
    loop.close()
    assert traced > 0 and len(calls) == traced
    assert np.abs(np.asarray(state.outer_params)).max() > 0.01  # the logits have moved


@pytest.fixture
def cifar(monkeypatch):
    """The config of the paper's setting, on images of its shape."""
    from examples.darts import images, task

    rng = np.random.default_rng(0)
    part = lambda n: images.Part(
        rng.normal(size=(n, 32, 32, 3)).astype(np.float32), np.arange(n, dtype=np.int32) % 10
    )
    made = images.Images(part(128), part(128), part(50), part(20), 10)
    monkeypatch.setattr(task, "load_images", lambda config: made)
    return made


def test_the_retraining_of_the_papers_setting_is_the_papers(cifar):
    config = load("configs/darts_cifar10.py")
    network = training.make_network(config, NORMAL_AND_REDUCE, cifar)
    reductions = [i for i, reduce in enumerate(network.stack.reductions) if reduce]
    assert (len(network.stack.reductions), reductions) == (20, [6, 13])
    assert 1e6 < training.count_parameters(network, (32, 32, 3)) < 5e6  # the paper's: 3.3e6


@pytest.mark.slow
def test_the_search_step_of_the_papers_setting_is_traced_and_lowered(cifar):
    from bilevel_flax import sharding
    from bilevel_flax.plan import step

    config = load("configs/darts_cifar10.py")
    lowered = step.lower(config, sharding.make_mesh("data=1", jax.devices()[:1]))
    inner = lowered.batch.inner["image"]
    assert inner.shape == (64, 32, 32, 3)
    assert lowered.flops / lowered.gradient_flops <= 4.05
    assert "convolution" in lowered.program.as_text()


@pytest.mark.slow
def test_twenty_steps_on_images_of_cifar_in_a_reduced_width(data_dir, tmp_path):
    """The subset's tar, one cell of each kind, two cells found."""
    settings = [
        f"data.manual_dir={data_dir}",
        "data.splits=(160,200,40)",
        "data.held_out=40",
        "network.width=2",
        "network.cells=2",
        "network.reductions=(1,)",
        "network.stem_stride=4",
        "network.as_matrix=True",
        "batch_size=8",
        "steps=20",
        "eval_every=20",
        "checkpoint.every=100",
        "health.every=0",
        "health.summary=False",
    ]
    summary = train_and_evaluate(load("configs/darts_cifar10.py", settings), tmp_path)
    assert summary["steps"] == summary["stopped_at"] == 20
    assert 0 <= summary["supernet_validation_error"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["inner_loss"]) for row in rows if "inner_loss" in row)
    found = genotype.load(tmp_path / "genotype.json")
    assert len(found.normal) == len(found.reduce) == genotype.NODES
