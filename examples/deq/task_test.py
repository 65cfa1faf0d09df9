"""The equilibrium network's gradient, and the mistakes that are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.checks import UserError
from bilevel_flax.train import config as configs
from bilevel_flax.train import experiment
from bilevel_flax.train.step_runner import StepRunner
from examples.deq import model, solvers, task

CONFIG = Path(__file__).parents[2] / "configs" / "deq.py"
EXAMPLES, FEATURES, WIDTH, CLASSES, MARGIN, STEP = 3, 5, 4, 3, 0.5, 0.4


def setting():
    rng = np.random.default_rng(0)
    x = model.init(jax.random.PRNGKey(0), FEATURES, WIDTH, CLASSES)
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), x)
    batch = {
        "image": jnp.asarray(rng.normal(size=(EXAMPLES, FEATURES))),
        "label": jnp.array([0, 2, 1]),
        "state": jnp.arange(EXAMPLES, dtype=jnp.int32),
    }
    return x, batch


def gradient(x, batch, decay=0.01):
    """Backprop through as many iterations as it takes."""

    def loss(x):
        apply = model.layer(x, MARGIN, batch["image"])
        step = lambda z, _: (z + STEP * (apply(z) - z), None)
        z, _ = jax.lax.scan(step, jnp.zeros((EXAMPLES, WIDTH)), None, length=300)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))
        return model.cross_entropy(x, z, batch["label"]).mean() + 0.5 * decay * squares

    return jax.jit(jax.grad(loss))(x)


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), found, wanted)


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_tracked_states_end_at_the_gradient(iterations, x64):
    x, batch = setting()
    problem = task.make_problem(MARGIN, STEP, iterations, "example", 0.01)
    solver = solvers.tracked(problem, outer=optax.set_to_zero())
    state = solver.init(jnp.zeros((EXAMPLES + 2, WIDTH)), x)  # two rows that no minibatch visits
    both = bf.Batch(batch, batch)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.update(s, both), s, None, 400)[0])
    state = run(state)
    evaluate = jax.jit(lambda point: bf.oracles.evaluate_all(problem, point, both).oracles)
    close(bf.oracles.directions(evaluate(state.variables)).outer, gradient(x, batch))
    assert not np.any(state.inner_params[EXAMPLES:])


def test_the_states_of_a_minibatch_are_solved_for(x64):
    x, batch = setting()
    problem = task.make_problem(MARGIN, STEP, 1, "minibatch", 0.01)
    solver = solvers.solved(
        problem, outer=optax.sgd(1.0), inner_steps=300, adjoint_steps=EXAMPLES * WIDTH
    )
    state = solver.init(jnp.zeros((EXAMPLES, WIDTH)), x)
    new, info = jax.jit(solver.update)(state, bf.Batch(batch, batch))
    found = jax.tree.map(jnp.subtract, state.outer_params, new.outer_params)
    close(found, gradient(x, batch))
    assert info.metrics["adjoint_unsolved"] == 0


def test_padding_has_no_condition():
    x, batch = setting()
    batch |= {"state": jnp.array([0, 1, 1]), "mask": jnp.array([1.0, 1.0, 0.0])}
    problem = task.make_problem(MARGIN, STEP, 2, "example", 0.0)
    z = jnp.ones((EXAMPLES, WIDTH))
    gradient = jax.jit(lambda batch: bf.oracles.inner_grad(problem, z, x, batch))
    short = {name: leaf[:2] for name, leaf in batch.items() if name != "mask"}
    found, wanted = gradient(batch), gradient(short)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert not np.any(found[2])


def test_paired_minibatches_have_the_same_numbers(monkeypatch):
    monkeypatch.setattr(task.extras, "require", lambda extra: None)  # nothing is measured
    config = configs.load(str(CONFIG), ["data.splits=(60,10,10)", "batch_size=20", "width=4"])
    made = task.make_task(config)
    solver = solvers.tracked(made.problem, outer=optax.sgd(0.1))
    loop = StepRunner(solver, made.inner, made.outer, seed=3, paired=True)
    ids = [sampler.ids(0, 9).tolist() for sampler in loop.samplers]
    assert ids[0] == ids[1]
    other = dataclasses.replace(made.outer, num_batches=2)
    with pytest.raises(ValueError, match="paired minibatches: 3 inner and 2 outer"):
        StepRunner(solver, made.inner, other, paired=True)


def test_a_fixed_point_that_is_not_reached_is_named():
    pytest.importorskip("optimistix")
    x, batch = setting()
    with pytest.raises(UserError, match="residual .* at iteration 3, --config.tolerance=1e-06"):
        model.equilibrium(x, MARGIN, batch["image"], STEP, 1e-6, 3)
    z = model.equilibrium(x, MARGIN, batch["image"], STEP, 1e-6, 500)
    apply = model.layer(x, MARGIN, batch["image"])
    np.testing.assert_allclose(apply(z), z, atol=1e-5)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("states=batch", "--config.states=batch.*minibatch"),
        ("state_dtype=int8", "--config.state_dtype=int8.*float16"),
        ("margin=0.0", "--config.margin must be a positive number .*, got 0.0"),
        ("step=-0.5", "--config.step must be a positive number .*, got -0.5"),
        ("tolerance=0.0", "--config.tolerance must be a positive number"),
        ("width=0", "--config.width must be an integer >= 1, got 0"),
        ("data.splits=(60,0,10)", "--config.data.splits=.*: no validation examples of mnist5k"),
    ],
)
def test_a_mistake_in_the_config_is_named(setting, message, monkeypatch):
    monkeypatch.setattr(task.extras, "require", lambda extra: None)
    with pytest.raises(UserError, match=message):
        task.make_task(configs.load(str(CONFIG), [setting]))


def test_a_missing_optimistix_is_named_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(task.extras, "EXTRAS", {"fixed_point": ("no_such_module",)})
    with pytest.raises(ModuleNotFoundError, match=r"no_such_module .*bilevel-flax\[fixed_point\]"):
        task.make_task(configs.load(str(CONFIG), []))


@pytest.mark.slow
def test_a_network_is_trained(tmp_path):
    pytest.importorskip("optimistix")
    settings = ["data.splits=(1000,300,300)", "epochs=30", "width=32", "unrolled_steps=20"]
    summary = experiment.train_and_evaluate(configs.load(str(CONFIG), settings), tmp_path)
    assert summary["test_error"] < summary["unrolled"]["test_error"] + 0.03 < 0.25
    assert summary["ours"]["temporary_bytes"] < summary["unrolled"]["temporary_bytes"]
