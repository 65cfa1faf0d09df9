"""The five quantities against dense Jacobians, and what they cost."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import logistic

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.oracles import directions
from bilevel_flax.tree import split

EXACT = ("forward_over_reverse", "reverse_over_reverse")


def is_float(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def randomised(tree, seed):
    """Float leaves drawn anew in float64; the others as they are."""
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(0.5 * rng.normal(size=jnp.shape(a))) if is_float(a) else a
    return jax.tree.map(draw, tree)


def relative(found, expected):
    """‖found - expected‖ / ‖expected‖ over the float leaves."""
    pick = lambda tree: [
        np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree) if is_float(a)
    ]
    a, b = np.concatenate(pick(found)), np.concatenate(pick(expected))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def dense_oracles(inner_loss, outer_loss, z, v, x):
    """The five quantities from materialised Jacobians of functions of flat vectors."""
    flat_z, to_z = ravel_pytree(z)
    flat_x, to_x = ravel_pytree(x)
    flat_v = ravel_pytree(v)[0]
    inner = lambda a, b: inner_loss(to_z(a), to_x(b))
    outer = lambda a, b: outer_loss(to_z(a), to_x(b))
    hessian = jax.hessian(inner)(flat_z, flat_x)
    cross = jax.jacfwd(jax.grad(inner, 1), 0)(flat_z, flat_x)
    return bf.Oracles(
        to_z(jax.grad(inner)(flat_z, flat_x)),
        to_z(hessian @ flat_v),
        to_x(cross @ flat_v),
        to_z(jax.grad(outer)(flat_z, flat_x)),
        to_x(jax.grad(outer, 1)(flat_z, flat_x)),
    )


# Each case: () -> (inner_loss, outer_loss, z, x, batch, model_state, stateful), losses in the
# form that the Problem takes.


def nested():
    z = {"layers": [{"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, (jnp.ones((4, 2)),)], "scale": 1.0}
    x = {"decay": {"first": jnp.ones(4), "rest": jnp.ones(())}, "shift": [jnp.ones(2)], "no": None}

    def forward(z, data):
        first, (second,) = z["layers"]
        hidden = jnp.tanh(data @ first["w"] + first["b"][None, :])
        return z["scale"] * hidden @ second

    def inner(z, x, data):
        out = forward(z, data) - x["shift"][0][None, :]
        first = z["layers"][0]["w"]
        penalty = jnp.sum(jnp.exp(x["decay"]["first"])[None, :] * first**2)
        return jnp.mean(out**2 * jnp.cos(out)) + penalty + x["decay"]["rest"] ** 3 * z["scale"] ** 2

    def outer(z, x, data):
        return jnp.mean(jnp.sin(forward(z, data))) + jnp.sum(x["decay"]["first"] ** 2)

    return inner, outer, z, x, jnp.ones((5, 3)), None, False


def tied_weights():
    z = {"embedding": jnp.ones((5, 3)), "mix": jnp.ones((3, 3))}

    def logits(z, tokens):
        return jnp.tanh(z["embedding"][tokens] @ z["mix"]) @ z["embedding"].T

    def inner(z, x, batch):
        out = nn.log_softmax(logits(z, batch["tokens"]) * jnp.exp(x)[None, :])
        return -jnp.mean(jnp.take_along_axis(out, batch["next"][:, None], 1))

    def outer(z, x, batch):
        return jnp.mean(logits(z, batch["next"]) ** 2) + jnp.sum(x**4)

    batch = {"tokens": jnp.array([0, 1, 2, 2]), "next": jnp.array([1, 2, 3, 4])}
    return inner, outer, z, jnp.ones(5), batch, None, False


class Net(nn.Module):
    """Two layers with BatchNorm and dropout between them."""

    norm: bool = False
    rate: float = 0.0
    remat: bool = False

    @nn.compact
    def __call__(self, inputs, train=False):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        hidden = dense(6, name="first")(inputs)
        if self.norm:
            hidden = nn.BatchNorm(use_running_average=not train, momentum=0.7)(hidden)
        hidden = nn.Dropout(self.rate, deterministic=not train)(nn.softplus(hidden))
        return dense(1, name="last")(hidden)[:, 0]


def linen(**options):
    model = Net(**options)
    init = jax.jit(model.init)(jax.random.PRNGKey(0), jnp.ones((1, 3)))
    init = jax.tree.map(lambda a: a.astype(float), init)
    z = init.pop("params")
    x = {"labels": jnp.ones(5), "penalty": jnp.ones(())}

    def inner(z, x, batch, model_state, rng):
        out, state = model.apply(
            {"params": z, **model_state}, batch, True, rngs={"dropout": rng}, mutable=list(init)
        )
        value = jnp.mean((out - x["labels"]) ** 2)
        value += jnp.exp(x["penalty"]) * sum(jnp.sum(a**2) for a in jax.tree.leaves(z))
        return value, bf.Aux(state, {"mean": out.mean()})

    def outer(z, x, batch, model_state, rng):
        del rng
        out = model.apply({"params": z, **model_state}, batch)
        return jnp.mean(jnp.exp(-out)) + x["penalty"] ** 2, bf.Aux(model_state)

    return inner, outer, z, x, jnp.ones((5, 3)), init, True


def integer_leaves():
    inner, outer, z, x, batch, *rest = nested()
    bits = jnp.array([3, 4])

    def with_bits(loss):
        return lambda z, x, batch: loss(z["net"], x["at"], batch) * z["bits"][1] / x["count"]

    z, x = {"net": z, "bits": bits}, {"at": x, "count": jnp.int32(2)}
    return with_bits(inner), with_bits(outer), z, x, batch, *rest


CASES = {
    "nested_with_integers": integer_leaves,
    "tied_weights": tied_weights,
    "dropout": functools.partial(linen, rate=0.4),
    "batch_norm_dropout_remat": functools.partial(linen, norm=True, rate=0.4, remat=True),
}


def build(case):
    """The problem at a random point in float64."""
    inner, outer, z, x, data, model_state, stateful = CASES[case]()
    problem = bf.Problem(inner, outer, stateful=stateful)
    z, x, data = (randomised(tree, seed) for seed, tree in enumerate((z, x, data)))
    v = jax.tree.map(lambda a: a if is_float(a) else jnp.zeros_like(a), randomised(z, 3))
    rng = jax.random.PRNGKey(7) if stateful else None
    return problem, bf.Variables(z, v, x), bf.Batch(data, data), model_state, rng


def dense_of(problem, point, batch, model_state, rng):
    """`dense_oracles` of a problem; one key each for G and F, as `evaluate` splits it."""
    keys = (None, None) if rng is None else tuple(jax.random.split(rng))

    def plain(loss, data, key):
        if not problem.stateful:
            return lambda z, x: loss(z, x, data)
        return lambda z, x: loss(z, x, data, model_state, key)[0]

    z, v, x = point
    inner = plain(problem.inner_loss, batch.inner, keys[0])
    outer = plain(problem.outer_loss, batch.outer, keys[1])
    # Integer leaves are constants: ravel only the others.
    z_split, x_split = split(z), split(x)
    found = dense_oracles(
        lambda a, b: inner(z_split.merge(a), x_split.merge(b)),
        lambda a, b: outer(z_split.merge(a), x_split.merge(b)),
        z_split.leaves,
        split(v).leaves,
        x_split.leaves,
    )
    as_z, as_x = z_split.complete, x_split.complete
    return bf.Oracles(
        as_z(found.inner_grad),
        as_z(found.hvp),
        as_x(found.cross_jvp),
        as_z(found.outer_grad_inner),
        as_x(found.outer_grad_outer),
    )


def assert_oracles(found, expected, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, a, b in zip(bf.Oracles._fields, found, expected, strict=True):
        assert relative(a, b) <= tolerance, name


def variants(problem):
    """The problem with every way to differentiate it."""
    for derivatives in (*EXACT, "finite_differences"):
        for remat in (False, True) if derivatives == EXACT[0] else (False,):
            settings = {"derivatives": derivatives, "remat": remat}
            yield oracles.configured(problem, settings)


@pytest.mark.parametrize("case", CASES)
def test_oracles_equal_dense_jacobians(case, x64):
    problem, *inputs = build(case)

    @jax.jit
    def run(point, batch, model_state, rng):
        found = [oracles.evaluate(v, point, batch, model_state, rng) for v in variants(problem)]
        return dense_of(problem, point, batch, model_state, rng), found

    expected, all_found = run(*inputs)
    assert all(np.linalg.norm(ravel_pytree(part)[0]) > 1e-3 for part in expected)
    for variant, found in zip(variants(problem), all_found, strict=True):
        found = found[0] if problem.stateful else found
        exact = variant.derivatives in EXACT
        assert_oracles(found, expected, 1e-8 if exact else 1e-7)
        assert exact or relative(found.hvp, expected.hvp) > 1e-13  # it is the approximate one
        for products, params in ((found.hvp, inputs[0].inner), (found.cross_jvp, inputs[0].outer)):
            same = jax.tree.map(lambda a, b: a.dtype == b.dtype, products, params)
            assert all(jax.tree.leaves(same))


def test_finite_differences_in_float32_err_by_the_documented_amount(x64):
    problem, point, batch, *_ = build("tied_weights")
    approximate = dataclasses.replace(problem, derivatives="finite_differences")
    single = jax.tree.map(lambda a: a.astype(jnp.float32) if is_float(a) else a, (point, batch))
    exact, found = jax.jit(
        lambda: (oracles.evaluate(problem, point, batch), oracles.evaluate(approximate, *single))
    )()
    assert found.hvp["mix"].dtype == jnp.float32
    for name in ("hvp", "cross_jvp"):
        assert 1e-7 < relative(getattr(found, name), getattr(exact, name)) < 1e-3


def test_bf16_compute_with_f32_masters_gives_the_product_to_about_a_percent():
    def problem(dtype):
        def loss(z, x, batch):
            low = lambda a: a.astype(dtype)
            hidden = nn.gelu(low(batch) @ low(z["a"]))
            logits = (hidden @ low(z["b"])).astype(jnp.float32)
            return -jnp.mean(nn.log_softmax(logits)[:, 0]) * jnp.exp(x)

        return bf.Problem(loss, loss)

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
    z, v = ({"a": draw(32, 64), "b": draw(64, 10)} for _ in range(2))
    point = bf.Variables(z, v, jnp.float32(0.0))
    batch = bf.Batch(draw(16, 32) * 4, draw(16, 32) * 4)
    exact, found = jax.jit(
        lambda: [oracles.evaluate(problem(d), point, batch) for d in (jnp.float32, jnp.bfloat16)]
    )()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    assert 1e-4 < relative(found.hvp, exact.hvp) < 0.03


def test_per_sample_rows_equal_the_dense_form_that_gathers_for_itself(x64):
    declared, plain = logistic(per_sample=True), logistic(per_sample=False)
    point = bf.Variables(
        declared.inner_params, randomised(declared.inner_params, 5), declared.outer_params
    )

    @jax.jit
    def both(i, j):
        batch = declared.batch(i, j)
        found = oracles.evaluate(declared.problem, point, batch)
        scattered = rows.densify(found.cross_jvp, point.outer)
        return found, scattered, oracles.evaluate(plain.problem, point, batch)

    for i in range(4):
        found, scattered, expected = both(i, 1)
        assert isinstance(found.cross_jvp["logits"], bf.Rows)
        assert found.cross_jvp["logits"].values.shape == (2,)
        assert found.outer_grad_outer["logits"] is None
        assert relative(scattered, expected.cross_jvp) < 1e-12
        assert np.linalg.norm(scattered["logits"]) > 1e-4
        for name in ("inner_grad", "hvp", "outer_grad_inner"):
            assert relative(getattr(found, name), getattr(expected, name)) < 1e-12
    # The last minibatch is padded: its second row stands for no sample.
    assert found.cross_jvp["logits"].index.tolist() == [6, 7]


def test_batch_norm_moves_once_an_update_by_the_inner_forward_pass(x64):
    problem, point, batch, model_state, rng = build("batch_norm_dropout_remat")
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(point.inner, point.outer, model_state=model_state, rng=rng)
    # Two different outer batches: F evaluates, so it must not matter which.
    (state_a, _), (state_b, _) = jax.jit(
        lambda: [solver.update(state, batch._replace(outer=batch.outer + k)) for k in (0, 1)]
    )()
    mean = np.asarray(model_state["batch_stats"]["BatchNorm_0"]["mean"])
    dense = point.inner["first"]
    forward = batch.inner @ dense["kernel"] + dense["bias"][None, :]
    expected = 0.7 * mean + 0.3 * np.asarray(forward).mean(0)
    found = state_a.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(found, state_b.model_state["batch_stats"]["BatchNorm_0"]["mean"])


def test_primal_and_tangent_share_one_dropout_mask_and_steps_do_not():
    def inner(z, x, batch, model_state, rng):
        mask = jax.random.bernoulli(rng, 0.5, z.shape)
        loss = 0.5 * jnp.sum(jnp.where(mask, z * x, 0.0) ** 2)
        return loss, bf.Aux(model_state, {"mask": mask})

    def outer(z, x, batch, model_state, rng):
        return jnp.sum(z) + x, bf.Aux(model_state)

    problem = bf.Problem(inner, outer, stateful=True)
    point = bf.Variables(jnp.ones(64), jnp.full(64, 2.0), jnp.float32(1.0))
    batch = bf.Batch(jnp.zeros(1), jnp.zeros(1))
    found, aux = jax.jit(functools.partial(oracles.evaluate, problem))(
        point, batch, {}, jax.random.PRNGKey(3)
    )
    mask = np.asarray(aux.metrics["inner_mask"])
    assert 10 < mask.sum() < 54
    np.testing.assert_array_equal(found.inner_grad, mask)
    np.testing.assert_array_equal(found.hvp, 2.0 * mask)
    assert float(found.cross_jvp) == 4.0 * mask.sum()

    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(point.inner, point.outer, rng=jax.random.PRNGKey(3))
    step = jax.jit(solver.update)
    state, first = step(state, batch)
    _, second = step(state, batch)
    assert (first.metrics["inner_mask"] != second.metrics["inner_mask"]).any()


def test_a_custom_vjp_inside_a_custom_vjp_needs_reverse_over_reverse(x64):
    @jax.custom_vjp
    def square(a):
        return a**2

    square.defvjp(lambda a: (a**2, a), lambda a, g: (2 * a * g,))

    @jax.custom_vjp
    def cube(a):
        return a**3

    cube.defvjp(lambda a: (a * square(a), a), lambda a, g: (3 * square(a) * g,))

    loss = lambda cube: lambda z, x, batch: jnp.sum(cube(z) * jnp.sin(x))
    point = bf.Variables(jnp.arange(1.0, 4.0), jnp.ones(3), jnp.arange(3.0))
    batch = bf.Batch(jnp.zeros(1), jnp.zeros(1))
    hidden, plain = loss(cube), loss(lambda a: a**3)
    with pytest.raises(TypeError, match='derivatives="reverse_over_reverse"'):
        oracles.evaluate(bf.Problem(hidden, hidden), point, batch)
    backwards = bf.Problem(hidden, hidden, derivatives="reverse_over_reverse")
    dense = lambda z, x: plain(z, x, None)
    found, expected = jax.jit(
        lambda: (oracles.evaluate(backwards, point, batch), dense_oracles(dense, dense, *point))
    )()
    assert_oracles(found, expected, 1e-12)


def test_the_outer_direction_at_the_solution_is_the_hypergradient(x64):
    task = logistic(batch=7, num_outer_samples=5)
    problem, batch = task.problem, task.batch(0, 0)
    start, to_z = ravel_pytree(task.inner_params)
    flat_x, to_x = ravel_pytree(task.outer_params)
    inner = lambda z, x: problem.inner_loss(to_z(z), to_x(x), batch.inner)
    outer = lambda z, x: problem.outer_loss(to_z(z), to_x(x), batch.outer)

    @jax.jit
    def solve(x):
        newton = lambda _, z: z - jnp.linalg.solve(jax.hessian(inner)(z, x), jax.grad(inner)(z, x))
        return jax.lax.fori_loop(0, 30, newton, start)

    @jax.jit
    def dense(z, x):
        sensitivity = -jnp.linalg.solve(
            jax.hessian(inner)(z, x), jax.jacfwd(jax.grad(inner), 1)(z, x)
        )
        v = -jnp.linalg.solve(jax.hessian(inner)(z, x), jax.grad(outer)(z, x))
        return v, jax.grad(outer, 1)(z, x) + sensitivity.T @ jax.grad(outer)(z, x)

    z = solve(flat_x)
    assert np.linalg.norm(jax.jit(jax.grad(inner))(z, flat_x)) < 1e-13
    v, hypergradient = dense(z, flat_x)
    point = bf.Variables(to_z(z), to_z(v), task.outer_params)
    d_z, d_v, d_x = directions(jax.jit(functools.partial(oracles.evaluate, problem))(point, batch))
    assert relative(rows.densify(d_x, point.outer), to_x(hypergradient)) < 1e-8
    assert max(np.abs(ravel_pytree((d_z, d_v))[0])) < 1e-12

    step = 1e-5 * np.eye(8)
    around = jax.jit(jax.vmap(lambda x: outer(solve(x), x)))
    central = (around(flat_x[None] + step) - around(flat_x[None] - step)) / 2e-5
    assert relative(rows.densify(d_x, point.outer), to_x(central)) < 1e-5


class Transformer(nn.Module):
    """Causal, pre-norm, two heads; small enough to compile in seconds."""

    layers: int = 6
    width: int = 32
    vocabulary: int = 64

    @nn.compact
    def __call__(self, tokens):
        hidden = nn.Embed(self.vocabulary, self.width)(tokens)
        causal = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            normed = nn.LayerNorm()(hidden)
            hidden += nn.MultiHeadDotProductAttention(2)(normed, mask=causal)
            wide = nn.Dense(4 * self.width)(nn.LayerNorm()(hidden))
            hidden += nn.Dense(self.width)(nn.gelu(wide))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(hidden))


@pytest.mark.parametrize("layers", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_what_a_transformer_costs_in_gradients(layers):
    model = Transformer(layers)
    tokens = jnp.zeros((8, 17), jnp.int32)

    def per_token(z, batch):
        logits = model.apply({"params": z}, batch["tokens"][:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])

    def inner_loss(z, x, batch):
        return jnp.mean(jax.nn.sigmoid(x)[:, None] * per_token(z, batch))

    problem = bf.Problem(
        inner_loss, lambda z, x, batch: jnp.mean(per_token(z, batch)), per_sample=True
    )
    # Nothing runs, so only shapes matter.
    z = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens[:, :-1])["params"]
    x = jax.ShapeDtypeStruct((100,), jnp.float32)
    batch = bf.Batch(*({"tokens": tokens, "index": jnp.arange(8)} for _ in range(2)))

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    row = jax.ShapeDtypeStruct((8,), jnp.float32)
    gradient = flops(jax.grad(inner_loss), z, row, batch.inner)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = jax.eval_shape(solver.init, z, x)
    assert 3.9 < flops(solver.update, state, batch) / gradient <= 4.05
    products = lambda point, data: oracles.inner_products(problem, point, data)[1:]
    cost = flops(products, bf.Variables(z, z, x), batch.inner)
    assert 2.9 < cost / gradient <= 3.05
