"""NNX modules in, modules out: the numbers of linen, one draw and one update a step."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf

N, BATCH, CLASSES = 12, 6, 3
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(N, 4, 4, 1)).astype(np.float32)
TOKENS = rng.integers(0, 5, size=(N, 3))
LABELS = rng.integers(0, CLASSES, size=N)
weights = bf.outer.sigmoid(N)


UPDATE = lambda model, optimizer, batch: optimizer.update(model, batch)


def batches(data, steps):
    """Training and validation minibatches, both from the same examples."""
    for step in range(steps):
        index = (np.arange(BATCH) + 5 * step) % N
        other = (np.arange(BATCH) + 7 * step) % N
        yield bf.Batch(
            {"data": data[index], "label": LABELS[index], "index": index},
            {"data": data[other], "label": LABELS[other]},
        )


def entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# Each pair: a linen module, an nnx module, and from linen's variables to nnx' Params and the rest.
class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        hidden = nn.tanh(nn.Dense(5, name="first")(images.reshape(len(images), -1)))
        return nn.Dense(CLASSES, name="second")(hidden)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 5, rngs=rngs)
        self.second = nnx.Linear(5, CLASSES, rngs=rngs)

    def __call__(self, images):
        return self.second(nnx.tanh(self.first(images.reshape(len(images), -1))))


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        out = nn.Conv(4, (3, 3), strides=2, name="conv")(images)
        out = nn.tanh(nn.BatchNorm(not train, momentum=0.9, name="norm")(out))
        out = nn.Dropout(0.0, deterministic=not train)(out.reshape(len(out), -1))
        return nn.Dense(CLASSES, name="out")(out)


class CNN(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, images):
        out = nnx.tanh(self.norm(self.conv(images)))
        return self.out(self.dropout(out.reshape(len(out), -1)))


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, tokens, train):
        embed = nn.Embed(5, CLASSES, name="embed")
        return embed.attend(nn.tanh(embed(tokens)).mean(1))[:, :CLASSES]


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, CLASSES, rngs=rngs)
        self.output = self.embed.embedding  # the same Param in two places

    def __call__(self, tokens):
        return (nnx.tanh(self.embed(tokens)).mean(1) @ self.output[...].T)[:, :CLASSES]


PAIRS = {
    "mlp": (LinenMLP, MLP, IMAGES),
    "cnn": (LinenCNN, CNN, IMAGES),
    "tied": (LinenTied, Tied, TOKENS),
}


def linen_problem(net, stateful):
    def forward(z, batch, model_state, key, train):
        variables = {"params": z, **model_state}
        rngs = {"dropout": key} if train else None
        return net.apply(
            variables, batch["data"], train=train, mutable=list(model_state), rngs=rngs
        )

    def inner_loss(z, x, batch, model_state, key):
        logits, new = forward(z, batch, model_state, key, True)
        loss = (weights.apply(x, batch) * entropy(logits, batch)).mean()
        return loss, bf.Aux(dict(new))

    def outer_loss(z, x, batch, model_state, key):
        return entropy(forward(z, batch, model_state, key, False)[0], batch).mean(), bf.Aux()

    if stateful:
        return bf.Problem(inner_loss, outer_loss, stateful=True, per_sample=True)
    return bf.Problem(
        lambda z, x, batch: inner_loss(z, x, batch, {}, jax.random.key(0))[0],
        lambda z, x, batch: outer_loss(z, x, batch, {}, None)[0],
        per_sample=True,
    )


def inner_loss(model, x, batch):
    return (weights.apply(x, batch) * entropy(model(batch["data"]), batch)).mean()


def outer_loss(model, x, batch):
    return entropy(model(batch["data"]), batch).mean()


def nnx_problem(model, **options):
    return bf.nnx.problem(inner_loss, outer_loss, model, weights.init(), per_sample=True, **options)


SOLVERS = {
    "soba": functools.partial(
        bf.soba, inner=optax.sgd(0.1, momentum=0.9), outer=bf.outer.lazy_sgd(0.5)
    ),
    "auto": functools.partial(bf.auto, inner=optax.adam(1e-2), steps=10),
}


@pytest.mark.parametrize(
    ("pair", "solver"), [("mlp", "soba"), ("tied", "soba"), ("cnn", "soba"), ("cnn", "auto")]
)
def test_the_numbers_of_linen(pair, solver):
    linen_class, nnx_class, data = PAIRS[pair]
    net, make = linen_class(), SOLVERS[solver]
    variables = dict(jax.jit(lambda key: net.init(key, data[:1], train=False))(jax.random.key(3)))
    z = variables.pop("params")
    by_linen = make(linen_problem(net, bool(variables)))
    state = by_linen.init(z, weights.init(), model_state=variables or None)

    model = nnx_class(nnx.Rngs(0))
    by_nnx = make(nnx_problem(model))
    # The same start, into the module.
    bf.nnx.write(state.replace(model_state=variables.get("batch_stats")), model)
    optimizer = bf.nnx.Optimizer(model, by_nnx, weights.init())
    update = nnx.jit(UPDATE)
    linen_update = jax.jit(by_linen.update)
    for batch in batches(data, 4):
        state, info = linen_update(state, batch)
        found = update(model, optimizer, batch)
        np.testing.assert_allclose(found.inner_loss, info.inner_loss, rtol=1e-5)
        np.testing.assert_allclose(found.outer_loss, info.outer_loss, rtol=1e-5)
    here = optimizer.state(model)
    assert jax.tree.structure(here.inner_params) == jax.tree.structure(state.inner_params)
    assert np.linalg.norm(flat(state.adjoint)) > 1e-3
    for name in ("inner_params", "adjoint", "outer_params"):
        expected, got = flat(getattr(state, name)), flat(getattr(here, name))
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected), name
    if variables:
        np.testing.assert_allclose(
            flat(here.model_state), flat(state.model_state["batch_stats"]), rtol=1e-5, atol=1e-7
        )
    assert (pair == "tied") == (len(jax.tree.leaves(here.inner_params)) == 1)


@pytest.fixture(scope="module")
def cnn():
    """A network with BatchNorm and dropout, its optimizer, a jitted step, and the trace count."""
    model = CNN(nnx.Rngs(0), rate=0.5)
    traces = []

    def counted(model, x, batch):
        traces.append(1)
        return inner_loss(model, x, batch)

    problem = bf.nnx.problem(counted, outer_loss, model, weights.init(), per_sample=True)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=bf.outer.lazy_sgd(0.5))

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, batch):
        return optimizer.update(model, batch)

    return model, problem, solver, step, traces


def fresh(cnn):
    _, _, solver, step, _ = cnn
    model = CNN(nnx.Rngs(0), rate=0.5)  # a clone would share its buffers, and the step donates them
    return model, bf.nnx.Optimizer(model, solver, weights.init()), step


def test_batchnorm_moves_exactly_once_a_step(cnn):
    model, optimizer, step = fresh(cnn)
    batch = next(batches(IMAGES, 1))
    features = model.conv(jnp.asarray(batch.inner["data"]))
    mean, var = features.mean((0, 1, 2)), features.var((0, 1, 2))
    variable, seed = model.norm.mean, np.array(jax.random.key_data(model.dropout.rngs.key[...]))
    step(model, optimizer, batch)
    np.testing.assert_allclose(model.norm.mean[...], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.norm.var[...], 0.9 + 0.1 * var, rtol=1e-4)
    assert model.norm.mean is variable  # in place: who holds the variable sees the new value
    np.testing.assert_array_equal(seed, jax.random.key_data(model.dropout.rngs.key[...]))


def test_one_trace_and_donated_buffers(cnn):
    model, optimizer, step = fresh(cnn)
    steps = iter(batches(IMAGES, 5))
    step(model, optimizer, next(steps))
    before, kernel = len(cnn[4]), model.out.kernel[...]
    for batch in steps:
        info = step(model, optimizer, batch)
    assert len(cnn[4]) == before
    assert kernel.is_deleted()
    assert int(optimizer.step) == 5
    assert np.isfinite(info.inner_loss)


def test_one_draw_of_dropout_for_primal_and_tangent(cnn):
    """∇G and Hv are those of ONE function: G under the key of the step."""
    model, problem, solver, _, _ = cnn
    state = bf.nnx.init(solver, model, weights.init())
    batch = next(batches(IMAGES, 1)).inner
    flat_z, to_z = ravel_pytree(state.inner_params)
    v = jnp.asarray(np.random.default_rng(1).normal(size=flat_z.shape), jnp.float32)
    x = state.outer_params[batch["index"]]

    @jax.jit
    def both(key):
        def loss(flat_z):
            return problem.inner_loss(to_z(flat_z), x, batch, state.model_state, key)[0]

        point = bf.Variables(state.inner_params, to_z(v), state.outer_params)
        (value, _), grad, hvp, _ = bf.oracles.inner_products(
            problem, point, batch, state.model_state, key
        )
        product = jax.grad(lambda z: jax.grad(loss)(z) @ v)(flat_z)
        found = value, ravel_pytree(grad)[0], ravel_pytree(hvp)[0]
        return found, (loss(flat_z), jax.grad(loss)(flat_z), product)

    values = []
    for key in (jax.random.PRNGKey(0), jax.random.PRNGKey(1)):
        found, expected = both(key)
        for a, b in zip(found, expected, strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
        values.append(float(found[0]))
    assert values[0] != values[1]  # the key is what draws
    _, (first, _, _) = both(jax.random.PRNGKey(0))
    assert values[0] == pytest.approx(float(first), rel=1e-6)


def test_a_draw_of_its_own_for_every_step_layer_and_lane():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, values):
            return self.scale * self.one(values), self.scale * self.two(values)

    model = Twice(nnx.Rngs(0))

    def loss(model, x, batch):
        one, two = model(jnp.ones(64))
        different = (one != two).mean()
        return (one * x).sum(), {
            "different": different,
            "kept": (one > 0) @ (2.0 ** jnp.arange(64)),
        }

    problem = bf.nnx.problem(loss, loss, model, jnp.ones(()), has_aux=True)
    solver = bf.soba(problem, inner=optax.sgd(0.0), outer=optax.sgd(0.0))
    state = bf.nnx.init(solver, model, jnp.ones(()), rng=jax.random.key(7))
    update, kept = jax.jit(solver.update), []
    for _ in range(3):
        state, info = update(state, bf.Batch(jnp.ones(()), jnp.ones(())))
        assert 0.2 < float(info.metrics["inner_different"]) < 0.8
        assert float(info.metrics["outer_different"]) == 0.0  # F: evaluation mode, nothing dropped
        kept.append(float(info.metrics["inner_kept"]))
    assert len(set(kept)) == 3


class Scorer(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, values):
        return nnx.sigmoid(self.out(values[:, None]))[:, 0]


def test_modules_and_arrays_in_x_and_a_state_that_comes_back():
    model, scorer = MLP(nnx.Rngs(0)), Scorer(nnx.Rngs(1))
    x = {"logits": weights.init(), "net": scorer}

    def inner_loss(model, x, batch):
        values = entropy(model(batch["data"]), batch)
        return (weights.apply(x["logits"], batch) * x["net"](values) * values).mean()

    marks = {"logits": True, "net": False}
    problem = bf.nnx.problem(inner_loss, outer_loss, model, x, per_sample=marks)
    assert not problem.stateful  # nothing but Params: methods with memory need not warn
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=bf.outer.lazy_sgd(0.5))
    optimizer = bf.nnx.Optimizer(model, solver, x)
    step = nnx.jit(UPDATE)
    first, second, third = batches(IMAGES, 3)
    kernel, before = scorer.out.kernel, np.array(scorer.out.kernel[...])
    step(model, optimizer, first)
    step(model, optimizer, second)
    assert scorer.out.kernel is kernel
    assert (np.asarray(kernel[...]) != before).all()
    assert optimizer.outer["net"] is scorer
    assert (optimizer.outer["logits"] != weights.init()).any()

    state = jax.tree.map(lambda leaf: np.array(leaf), optimizer.state(model))
    expected = jax.jit(solver.update)(optimizer.state(model), third)[0]
    step(model, optimizer, third)
    after = optimizer.state(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, expected)

    # A module and an optimizer made anew take the state up and go on the same.
    other, other_scorer = MLP(nnx.Rngs(5)), Scorer(nnx.Rngs(6))
    resumed = bf.nnx.Optimizer(other, solver, {"logits": weights.init() + 1, "net": other_scorer})
    resumed.restore(other, jax.tree.map(jnp.asarray, state))
    step(other, resumed, third)
    jax.tree.map(np.testing.assert_array_equal, resumed.state(other), after)
    np.testing.assert_array_equal(other_scorer.out.kernel[...], kernel[...])
    written = bf.nnx.write(jax.tree.map(jnp.asarray, state), model, x)
    np.testing.assert_array_equal(written["logits"], state.outer_params["logits"])
    np.testing.assert_array_equal(kernel[...], state.outer_params["net"]["out"]["kernel"])


def test_full_passes_are_those_of_the_solver():
    model, count = MLP(nnx.Rngs(0)), 3
    solver = bf.srba(
        nnx_problem(model),
        inner=optax.sgd(0.1),
        outer=bf.outer.lazy_sgd(0.5),
        num_inner_batches=count,
        num_outer_batches=count,
        period=4,
    )
    data = [one._replace(inner_id=i, outer_id=i) for i, one in enumerate(batches(IMAGES, count))]
    state = bf.nnx.init(solver, model, weights.init())
    optimizer = bf.nnx.Optimizer(model, solver, weights.init())
    update, refresh = nnx.jit(UPDATE), nnx.jit(lambda model, opt, batch: opt.refresh(model, batch))
    by_hand, pass_by_hand = jax.jit(solver.update), jax.jit(solver.refresh)
    passes = []
    for step in range(6):
        while (due := optimizer.due) is not None:
            side, i = ("inner", due) if due < count else ("outer", due - count)
            one = bf.Batch(**{side: getattr(data[i], side), f"{side}_id": i})
            before = jax.tree.map(np.array, bf.nnx.params(model))
            refresh(model, optimizer, one)
            jax.tree.map(np.testing.assert_array_equal, bf.nnx.params(model), before)
            state = pass_by_hand(state, one)
            passes.append((step, due))
        update(model, optimizer, data[step % count])
        state, _ = by_hand(state, data[step % count])
    assert passes == [(step, due) for step in (0, 4) for due in range(2 * count)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        optimizer.state(model),
        state,
    )


def test_wrt_holds_the_other_parameters_fixed():
    model = MLP(nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, nnx.PathContains("second"))
    solver = SOLVERS["soba"](nnx_problem(model, wrt=wrt))
    optimizer = bf.nnx.Optimizer(model, solver, weights.init(), wrt=wrt)
    first, second = np.array(model.first.kernel[...]), np.array(model.second.kernel[...])
    nnx.jit(UPDATE)(model, optimizer, next(batches(IMAGES, 1)))
    np.testing.assert_array_equal(model.first.kernel[...], first)
    assert (np.asarray(model.second.kernel[...]) != second).any()
    batch = next(batches(IMAGES, 1))
    with pytest.raises(ValueError, match="inner_params does not fit the model"):
        bf.nnx.Optimizer(model, solver, weights.init()).update(model, batch)


def test_a_host_starts_directions_as_a_solver():
    model = MLP(nnx.Rngs(0))
    problem = nnx_problem(model)
    directions = bf.directions(problem)
    state = bf.nnx.init(directions, model, weights.init())
    step = directions(state, next(batches(IMAGES, 1)))
    assert step.info.ok
    moved = jax.tree.map(lambda z, d: z - 0.5 * d, state.inner_params, step.directions.inner)
    bf.nnx.write(step.state.replace(inner_params=moved), model)
    np.testing.assert_array_equal(model.first.kernel[...], moved["first"]["kernel"])


def test_mistakes_get_one_line():
    model, batch = MLP(nnx.Rngs(0)), next(batches(IMAGES, 1))
    x = weights.init()
    solver = SOLVERS["soba"](nnx_problem(model))
    optimizer = bf.nnx.Optimizer(model, solver, x)

    def updating(inner, **options):
        made = bf.nnx.problem(inner, outer_loss, model, x, per_sample=True, **options)
        return lambda: bf.nnx.Optimizer(model, SOLVERS["soba"](made), x).update(model, batch)

    per_example = lambda model, x, batch: weights.apply(x, batch) * model(batch["data"])[:, 0]
    with_metrics = lambda model, x, batch: (inner_loss(model, x, batch), {})
    for error, words, call in (
        (
            ValueError,
            "no variable that wrt=.*no variables at all",
            lambda: nnx_problem(nnx.Module()),
        ),
        (
            ValueError,
            "nothing to learn; it has RngCount, RngKey",
            lambda: nnx_problem(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
        ),
        (
            TypeError,
            "must be an nnx.Module, got LinenMLP.*bf.Problem",
            lambda: nnx_problem(LinenMLP()),
        ),
        (TypeError, "inner_loss must return a real scalar, got shape", updating(per_example)),
        (TypeError, "inner_loss returned a tuple with has_aux=False", updating(with_metrics)),
        (
            TypeError,
            "inner_loss returned no tuple with has_aux=True",
            updating(inner_loss, has_aux=True),
        ),
        (
            TypeError,
            "solver must be a BilevelSolver, got Problem",
            lambda: bf.nnx.Optimizer(model, nnx_problem(model), x),
        ),
        (
            TypeError,
            "batch must be bf.Batch.*got dict",
            lambda: optimizer.update(model, batch.inner),
        ),
        (TypeError, "inner_params holds the NNX MLP", lambda: solver.init(model, x)),
    ):
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
