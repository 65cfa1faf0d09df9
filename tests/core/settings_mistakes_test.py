"""Mistakes in settings: methods, wrappers, optimisers, meshes, data; rows as in mistakes_test."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mistakes import assert_one_line
from optax.contrib import mechanize

import bilevel_flax as bf
from bilevel_flax import contrib, data, oracles, outer
from bilevel_flax.checkpoints.errors import CheckpointError
from bilevel_flax.solvers.soba import estimator

SGD = optax.sgd(0.1)
BATCH = bf.Batch(jnp.ones((4, 3)), jnp.ones((4, 3)))
SABA = {"num_inner_batches": 3, "num_outer_batches": 2}
TWO = {"inner_steps": 2, "adjoint_steps": 2}


def inner(z, x, batch):
    return jnp.mean((batch @ z - 1.0) ** 2) + x * jnp.sum(z**2)


def outer_loss(z, x, batch):
    return jnp.mean((batch @ z - 1.0) ** 2)


PLAIN = bf.Problem(inner, outer_loss)


def make(method: Callable = bf.soba, problem: bf.Problem = PLAIN, **options) -> Callable:
    return lambda: method(problem, **({"inner": SGD, "outer": SGD} | options))


def auto(**options) -> Callable:
    return make(bf.auto, **({"steps": 9} | options))


def step(inner_loss: Callable = inner, batch: bf.Batch = BATCH, method=bf.soba, **options):
    def run():
        solver = make(method, bf.Problem(inner_loss, outer_loss), **options)()
        state = solver.init(jnp.ones(3), jnp.ones(()))
        jax.eval_shape(lambda: solver.update(state, batch)[0].step)

    return run


POINT = bf.Variables(jnp.ones(3), jnp.zeros(3), jnp.ones(()))
DIRECTIONS = bf.directions(PLAIN)
# Whatever takes a problem, handed a loss.
OF_PROBLEMS: dict[str, Callable] = {
    "directions": bf.directions,
    "remat": oracles.remat,
    "microbatched": lambda problem: oracles.microbatched(problem, 2),
    "mixed_precision": lambda problem: oracles.mixed_precision(problem, "bfloat16"),
    "weighted_sums": oracles.weighted_sums,
    "trainable": lambda problem: oracles.trainable(problem, True),
    "probe": lambda problem: oracles.probe(problem, POINT, BATCH),
    "check_means": lambda problem: bf.diagnostics.check_means(problem, POINT, BATCH),
    "fit_memory": lambda problem: oracles.fit_memory(problem, POINT, BATCH),
    "data_parallel": lambda problem: bf.sharding.data_parallel(
        problem, bf.sharding.make_mesh("data=1", jax.devices()[:1])
    ),
}

MISTAKES: dict[str, tuple[Callable, type[Exception], str]] = {
    # --- auto
    "ascent": (auto(learning_rate=-1.0), ValueError, r"learning_rate=-1.0 must be >= 0"),
    "a step of x that is NaN": (
        auto(dense_learning_rate=float("nan")),
        ValueError,
        r"dense_learning_rate=nan must be >= 0",
    ),
    "a limit as text": (auto(travel="10"), TypeError, r"travel='10' must be a number >= 0"),
    "a negative damping": (auto(damping=-0.5), ValueError, r"damping=-0.5 must be >= 0"),
    "no part of a minibatch": (auto(subsample=0.0), ValueError, r"subsample=0.0 .*1/m.*0.5"),
    "a third, nearly": (auto(subsample=0.3), ValueError, r"subsample=0.3 must be 1/m"),
    "twice a minibatch": (auto(subsample=2), ValueError, r"subsample=2 must be 1/m"),
    "never": (auto(update_every=0), ValueError, r"update_every must be an integer >= 1, got 0"),
    "every one and a half": (auto(update_every=1.5), ValueError, r"update_every.*got 1.5"),
    "v backwards": (auto(adjoint_update_every=-2), ValueError, r"adjoint_update_every.*got -2"),
    "two ways to save": (
        auto(subsample=0.5, adjoint_update_every=2),
        ValueError,
        r"subsample=0.5 with adjoint_update_every=2.*choose one of the two",
    ),
    "a cheap step with an estimator": (
        auto(update_every=2, estimator=estimator()),
        ValueError,
        r"update_every=2.*estimator of your own.*leave one of them out",
    ),
    "steps as text": (auto(steps="9"), ValueError, r"steps must be an integer >= 1, got '9'"),
    "steps as a bool": (auto(steps=True), ValueError, r"steps must be an integer.*got True"),
    "no steps": (auto(steps=None), ValueError, r"steps must be an integer.*got None"),
    "warmup before the start": (auto(warmup=-0.1), ValueError, r"warmup=-0.1 must be >= 0"),
    "a tuner of steps": (
        lambda: auto(inner=mechanize(optax.adam(0.1)))().init(jnp.ones(3), jnp.ones(())),
        ValueError,
        r"inner=mechanize\(...\) tunes its step.*pass adjoint=",
    ),
    # --- other methods
    "a loss in the place of the problem": (
        make(problem=inner),
        TypeError,
        r"problem=<function inner.*no bf.Problem: pass bf.Problem\(inner_loss, outer_loss\)",
    ),
    "two losses in the place of the problem": (
        make(bf.amigo, (inner, outer_loss), **TWO),
        TypeError,
        r"problem=\(<function inner.*bf.Problem\(inner_loss, outer_loss\)",
    ),
    **{
        f"{name} of a loss": (
            lambda take=take: take(inner),
            TypeError,
            r"problem=<function inner.* is no bf.Problem: pass bf.Problem",
        )
        for name, take in OF_PROBLEMS.items()
    },
    "a tuple in the place of a state": (
        lambda: DIRECTIONS(tuple(POINT), BATCH),
        TypeError,
        r"state is a tuple, but must be what directions.init returned",
    ),
    "a tuple in the place of a point": (
        lambda: oracles.fit_memory(PLAIN, tuple(POINT), BATCH),
        TypeError,
        r"point is a tuple, but must be a TrainState",
    ),
    "one minibatch in the place of two": (
        lambda: oracles.fit_memory(PLAIN, POINT, BATCH.inner),
        TypeError,
        r"batch is a ArrayImpl, but must be a pair, bf.Batch\(inner, outer\)",
    ),
    "a tuple of minibatches": (
        lambda: bf.diagnostics.check_means(PLAIN, POINT, tuple(BATCH[:2])),
        TypeError,
        r"batch is a tuple, but must be bf.Batch\(training_minibatch, validation_minibatch\)",
    ),
    "probe without a minibatch": (
        lambda: oracles.probe(PLAIN, POINT, bf.Batch(None, BATCH.outer)),
        ValueError,
        r"batch has no inner minibatch: hand probe one",
    ),
    "a mesh of other axes": (
        lambda: bf.sharding.data_parallel(
            PLAIN, jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
        ),
        ValueError,
        r"mesh has the axes \('x',\), but data_parallel needs \['data', 'fsdp', 'tensor'\]",
    ),
    "first_order: a schedule": (
        make(bf.first_order, outer=None, steps=3, penalty=optax.constant_schedule(3.0)),
        ValueError,
        r"penalty must be a positive number, got <function",
    ),
    "no problem": (auto(problem=None), TypeError, r"problem=None is no bf.Problem"),
    "a seed as a key": (
        lambda: make()().init(jnp.ones(3), jnp.ones(()), rng=7),
        TypeError,
        r"rng=7 is no key: pass rng=jax.random.key\(7\)",
    ),
    "a float as a key": (
        lambda: make(bf.amigo, **TWO)().init(jnp.ones(3), jnp.ones(()), rng=0.5),
        TypeError,
        r"rng=0.5 is no key: pass rng=jax.random.key\(0\)",
    ),
    "a vector as an id": (
        step(batch=BATCH._replace(inner_id=jnp.arange(2), outer_id=0), method=bf.saba, **SABA),
        ValueError,
        r"batch.inner_id has shape \(2,\), but must be a scalar: saba takes one minibatch",
    ),
    "no passes": (make(bf.srba, **SABA, period=0), ValueError, r"period must be .* >= 1, got 0"),
    "a coin without heads": (
        make(contrib.spaba, **SABA, probability=0.0),
        ValueError,
        r"probability must lie in \(0, 1\], got 0.0: 1 / \(N \+ M\) is 0.2",
    ),
    "more than certain": (
        make(contrib.spaba, **SABA, probability=2),
        ValueError,
        r"probability must lie in \(0, 1\], got 2",
    ),
    "storm: eta": (make(bf.storm, eta=2.0), ValueError, r"eta must lie in \[0, 1\].*got 2.0"),
    "fsla: eta": (make(contrib.fsla, eta=-1), ValueError, r"eta must lie in \[0, 1\].*got -1"),
    "masoba: theta": (make(contrib.masoba, theta=0.0), ValueError, r"theta .*\(0, 1\], got 0.0"),
    "amigo: no inner step": (
        make(bf.amigo, inner_steps=0, adjoint_steps=2),
        ValueError,
        r"inner_steps must be an integer >= 1, got 0",
    ),
    "implicit: half a step": (
        make(bf.implicit, inner_steps=1, adjoint_steps=1.5),
        ValueError,
        r"adjoint_steps must be an integer >= 1, got 1.5",
    ),
    "stocbio: backwards": (
        make(bf.stocbio, adjoint_step=-0.1, **TWO),
        ValueError,
        r"adjoint_step must be a positive number or a schedule, got -0.1",
    ),
    "f2sa: no penalty": (
        make(bf.f2sa, inner_steps=2, penalty=0),
        ValueError,
        r"penalty must be a positive number or a schedule, got 0",
    ),
    "unrolled: -1": (make(bf.unrolled, inner_steps=-1), ValueError, r"inner_steps.*got -1"),
    # --- the problem and what wraps it
    "a list of names as rows": (
        lambda: bf.Problem(inner, outer_loss, per_sample="weights"),
        TypeError,
        r"per_sample='weights' must be a tree of booleans.*per_sample=True",
    ),
    "rows by number": (
        lambda: bf.Problem(inner, outer_loss, per_sample={"weights": 1}),
        TypeError,
        r"per_sample={'weights': 1} must be a tree of booleans",
    ),
    "a loss without a return": (
        step(lambda z, x, batch: None),
        TypeError,
        r"inner_loss returned None: return the mean",
    ),
    "a complex loss": (
        step(lambda z, x, batch: inner(z, x, batch) * 1j),
        TypeError,
        r"inner_loss must return a real scalar, got shape \(\) dtype complex64",
    ),
    "G without z": (
        step(lambda z, x, batch: x * jnp.mean(batch)),
        ValueError,
        r"inner_loss never uses inner_params.*inner_loss\(inner_params, outer_params, batch\)",
    ),
    "G with z and x exchanged": (
        step(lambda x, z, batch: inner(z[None].repeat(3), 1.0, batch) + 0.0 * z),
        ValueError,
        r"inner_loss never uses inner_params",
    ),
    "no microbatch": (
        lambda: oracles.microbatched(PLAIN, 0),
        ValueError,
        r"microbatches=0 must be an integer >= 1",
    ),
    "microbatches that do not divide": (
        lambda: step(oracles.microbatched(PLAIN, 3).inner_loss)(),
        ValueError,
        r"microbatches=3 does not divide the minibatch.*divisor of 4",
    ),
    "microbatches of a loss": (
        lambda: oracles.microbatched(inner, 2),
        TypeError,
        r"problem=<function inner.*no bf.Problem",
    ),
    "remat of a loss": (lambda: oracles.remat(inner), TypeError, r"problem=<function inner"),
    "precision of integers": (
        lambda: oracles.mixed_precision(PLAIN, jnp.int8),
        ValueError,
        r"compute_dtype=.*int8.*bfloat16",
    ),
    "a nickname of a dtype": (
        lambda: oracles.mixed_precision(PLAIN, "bf16"),
        ValueError,
        r"compute_dtype='bf16' is not among \('bfloat16'",
    ),
    # --- optimisers
    "lazy_sgd without a step": (
        lambda: outer.lazy_sgd(None),
        TypeError,
        r"learning_rate=None must be a number >= 0",
    ),
    "a step as text": (
        lambda: outer.lazy_adam("0.1"),
        TypeError,
        r"learning_rate='0.1' must be a number >= 0",
    ),
    "uphill": (lambda: outer.robust_sgd(-0.1), ValueError, r"learning_rate=-0.1 must be >= 0"),
    "b2 below 0": (lambda: outer.lazy_adam(0.1, b2=-0.1), ValueError, r"b2=-0.1 .*\[0, 1\)"),
    "decay above 1": (
        lambda: outer.normalized_sgd(0.1, decay=1.5),
        ValueError,
        r"decay=1.5 must lie in \[0, 1\)",
    ),
    "v's optimiser not called": (
        lambda: bf.adjoint.damped(optax.sgd, 1.0),
        TypeError,
        r"transform=<function sgd.*call it",
    ),
    "a target below v = 0": (
        lambda: bf.adjoint.self_damped(SGD, target=0.5),
        ValueError,
        r"target=0.5 must be > 1",
    ),
    # --- outer parameters
    "weights that start at NaN": (
        lambda: outer.sigmoid(3, init=float("nan")),
        ValueError,
        r"init=nan must be >=",
    ),
    "a frozen mixture": (
        lambda: outer.domain_weights(2, temperature=0.0),
        ValueError,
        r"temperature=0.0 must be positive",
    ),
    "logits of another mixture": (
        lambda: outer.domain_weights(2).weights(jnp.ones(3), {"domain": jnp.zeros(2, int)}),
        ValueError,
        r"outer_params has shape \(3,\), but there are 2 domains",
    ),
    # --- meshes and data
    "an axis that is unknown": (
        lambda: bf.sharding.make_mesh("dat=1"),
        ValueError,
        r"mesh=\"dat=1\" names the axis \"dat\": choose from data",
    ),
    "more devices than there are": (
        lambda: bf.sharding.make_mesh("data=64", jax.devices()[:1]),
        ValueError,
        r"mesh=\"data=64\" asks for .* 64 devices, but there are 1",
    ),
    "no device": (
        lambda: bf.sharding.make_mesh("data=0"),
        ValueError,
        r"gives data the size \"0\"",
    ),
    "a size in words": (
        lambda: bf.sharding.make_mesh("data=two"),
        ValueError,
        r"gives data the size \"two\": write an integer",
    ),
    "an axis twice": (
        lambda: bf.sharding.make_mesh("data=1,data=1"),
        ValueError,
        r"gives \"data\" twice",
    ),
    "no data": (lambda: data.partition({}, 2), ValueError, r"arrays holds no array"),
    "no minibatch": (
        lambda: data.partition({"x": np.ones(3)}, 0),
        ValueError,
        r"batch_size must lie between 1 and .*got 0",
    ),
    "a scalar as data": (
        lambda: data.partition({"x": np.float32(3)}, 1),
        TypeError,
        r"arrays\[\"x\"\] is a scalar",
    ),
    "rows of unequal length": (
        lambda: data.partition({"x": np.array([[1], [2, 3]], object)}, 1),
        TypeError,
        r"arrays\[\"x\"\] is no array of numbers",
    ),
    "labels with a hole": (
        lambda: data.check_labels(np.array([0.0, np.nan]), 2),
        TypeError,
        r"labels must be integers \[n\], got float64",
    ),
    "a label below 0": (
        lambda: data.check_labels(np.array([-1, 0]), 2),
        ValueError,
        r"labels\[0\] is -1, out of range for num_classes=2",
    ),
    "a kind of noise": (
        lambda: data.corrupt_labels(np.zeros(3, int), 0.5, 10, 0, "asymmetric"),
        ValueError,
        r"kind must be \"symmetric\" or \"class\" or \"instance\", got 'asymmetric'",
    ),
    "noise that is NaN": (
        lambda: data.corrupt_labels(np.zeros(3, int), float("nan"), 10, 0),
        ValueError,
        r"p must be a probability in \[0, 1\], got nan",
    ),
    "half a minibatch in all": (
        lambda: data.Sampler(3.5, 0),
        ValueError,
        r"num_batches must be an integer of at least 1, got 3.5",
    ),
    # --- what is kept
    "no checkpoint": (
        lambda: bf.checkpoints.restore("/no/such/folder", {}),
        CheckpointError,
        r"directory='/no/such/folder': there is no checkpoint",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_line(call, error, words):
    assert_one_line(call, error, words)
