"""One shared evaluation, three parallel updates: SOBA as the plain case of the single loop."""

from __future__ import annotations

import dataclasses
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import logistic, quadratics

import bilevel_flax as bf
from bilevel_flax import oracles, outer
from bilevel_flax import per_sample as rows
from bilevel_flax.oracles import directions


def gap(found, expected):
    """Largest difference of two trees over the largest entry of the second."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    worst = [float(jnp.abs(a - b).max()) for a, b in pairs]
    return max(worst) / max(float(jnp.abs(b).max()) for b in jax.tree.leaves(expected))


def same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def unit_soba(task):
    """SOBA whose moves are its directions."""
    return bf.soba(
        task.problem,
        inner=optax.sgd(1.0),
        outer=optax.sgd(1.0),
        inner_weights=task.inner_weights,
        outer_weights=task.outer_weights,
    )


def mean_direction(task, point):
    """The mean over all (i, j) of what one update subtracts from (z, v, x)."""
    solver = unit_soba(task)
    state = solver.init(point.inner, point.outer).replace(adjoint=point.adjoint)
    i, j = np.indices((len(task.inner_weights), len(task.outer_weights))).reshape(2, -1)

    def direction(i, j):
        after = solver.update(state, task.batch(i, j))[0].variables
        return jax.tree.map(jnp.subtract, point, after)

    found = jax.jit(jax.vmap(direction))(jnp.asarray(i), jnp.asarray(j))
    return jax.tree.map(lambda leaf: leaf.mean(0), found)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_mean_over_all_pairs_is_the_full_direction(ragged, x64):
    task = quadratics(ragged=ragged)
    assert len(set(task.inner_weights)) == (2 if ragged else 1)
    point = task.random_variables(4)
    assert gap(mean_direction(task, point), task.full_directions(point)) < 1e-12


@pytest.mark.parametrize("declared", [True, False])
def test_the_mean_over_all_pairs_is_the_full_direction_with_sample_weights(declared, x64):
    task, whole = logistic(per_sample=declared), logistic(per_sample=False, batch=7)
    z, x = task.inner_params, task.outer_params
    point = bf.Variables(z, jax.tree.map(lambda a: jnp.cos(a), z), x)
    full = directions(jax.jit(lambda: oracles.evaluate(whole.problem, point, whole.batch(0, 0)))())
    assert gap(mean_direction(task, point), full) < 1e-12


def test_with_a_distance_as_inner_loss_it_is_sgd_on_the_outer_one(x64):
    rng = np.random.default_rng(0)
    scale, shift = rng.uniform(0.5, 1.5, size=(40, 3)), rng.normal(size=(40, 3))
    problem = bf.Problem(
        lambda z, x, batch: 0.5 * jnp.sum((z - x) ** 2) + 0 * jnp.sum(batch),
        lambda z, x, batch: 0.5 * jnp.sum(batch[0] * (z - batch[1]) ** 2) + 0.05 * jnp.sum(x**2),
    )
    rate = 0.2
    solver = bf.soba(problem, inner=optax.sgd(1.0), outer=optax.sgd(rate))
    data = jnp.stack([jnp.asarray(scale), jnp.asarray(shift)], 1)

    def step(state, batch):
        state, _ = solver.update(state, bf.Batch(batch, batch))
        return state, state.outer_params

    # z starts at x, and v at zero.
    state = solver.init(jnp.ones(3), jnp.ones(3))
    found = jax.jit(lambda s: jax.lax.scan(step, s, data))(state)[1]

    x = np.ones(3)
    past = [x, x, x]  # x_{t-2}, x_{t-1}, x_t
    for t in range(40):
        late = scale[t - 1] * (past[0] - shift[t - 1]) if t > 0 else 0.0
        x = past[2] - rate * (late + 0.1 * past[2])
        past = [past[1], past[2], x]
        np.testing.assert_allclose(found[t], x, rtol=1e-12, atol=1e-14)


def test_no_two_leaves_of_the_state_share_a_buffer_and_all_are_donated():
    shared = jnp.ones(3)
    problem = bf.Problem(
        lambda z, x, batch: jnp.sum((z["a"] * z["b"] - x["c"] * x["d"]) ** 2),
        lambda z, x, batch: jnp.sum(z["a"] ** 2),
    )
    solver = bf.soba(
        problem, inner=optax.adam(0.1), outer=optax.chain(optax.clip(1.0), optax.adamw(0.1))
    )
    rng = jax.random.PRNGKey(0)
    state = solver.init({"a": shared, "b": shared}, {"c": shared, "d": shared}, rng=rng)
    leaves = jax.tree.leaves(state)
    given = [shared, rng]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in (*leaves, *given)]
    assert len(set(pointers)) == len(pointers)

    batch = bf.Batch(jnp.ones(3), jnp.ones(3))
    step = jax.jit(solver.update, donate_argnums=0)
    after, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in given)
    # Every leaf of the state is written over the old one.
    compiled = step.lower(after, batch).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(after))
    assert compiled.memory_analysis().alias_size_in_bytes == size


OUTER_TREES = {
    "python_scalar": 0.5,
    "scalar": jnp.float32(0.5),
    "list": [jnp.ones(2), 0.5],
    "nested": {"a": {"b": jnp.ones((2, 1))}, "c": [(jnp.float32(1.0),)]},
    "with_none": {"a": jnp.ones(2), "none": None},
    "tuple": (jnp.ones(2), {"b": 2.0}),
    "with_int": {"a": jnp.ones(2), "count": 3, "ids": jnp.arange(2)},
    "half": (jnp.ones(2, jnp.bfloat16), jnp.ones(2)),
}


@pytest.mark.parametrize("name", OUTER_TREES)
def test_outer_params_are_any_pytree(name):
    x = OUTER_TREES[name]

    def total(x):
        floats = [a for a in jax.tree.leaves(x) if jnp.issubdtype(jnp.result_type(a), jnp.inexact)]
        return sum(jnp.sum(jnp.asarray(a, jnp.float32)) for a in floats)

    problem = bf.Problem(
        lambda z, x, batch: 0.5 * jnp.sum((z["a"] - batch * total(x)) ** 2) * z["count"],
        lambda z, x, batch: jnp.sum(z["a"] * batch) + total(x),
    )
    solver = bf.soba(problem, inner=optax.sgd(0.1, momentum=0.9), outer=optax.adam(0.1))
    state = solver.init({"a": jnp.ones(2), "count": 2}, x)
    traces = 0

    def update(state, batch):
        nonlocal traces
        traces += 1
        return solver.update(state, batch)

    step = jax.jit(update, donate_argnums=0)
    batch = bf.Batch(jnp.ones(2), jnp.ones(2))
    types = jax.tree.map(lambda a: (a.dtype, a.weak_type), state)
    for _ in range(3):
        state, _ = step(state, batch)
    assert traces == 1
    assert jax.tree.map(lambda a: (a.dtype, a.weak_type), state) == types
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(state.outer_params) == jax.tree.structure(x)
    assert int(state.inner_params["count"]) == 2
    for old, new in zip(jax.tree.leaves(x), jax.tree.leaves(state.outer_params), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            # ∇₂F is 1 in every entry and v moves it by less: Adam goes down by .1 each time.
            np.testing.assert_allclose(
                np.asarray(new, np.float32), np.asarray(old, np.float32) - 0.3, atol=0.05
            )
        else:
            np.testing.assert_array_equal(new, old)


def test_types_are_stable_under_scan():
    problem = bf.Problem(
        lambda z, x, batch: jnp.sum((z["a"] - x["s"]) ** 2) + jnp.sum(z["b"] ** 2) * z["n"],
        lambda z, x, batch: jnp.sum(z["a"]) + jnp.sum(z["b"]),
    )
    solver = bf.soba(problem, inner=optax.adam(1e-2), outer=optax.sgd(1e-2))
    z = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16), "n": jnp.int8(2)}
    state = solver.init(z, {"s": 1.0}, rng=jax.random.key(0))
    batch = bf.Batch(jnp.ones(1), jnp.ones(1))
    # lax.scan refuses a carry whose types change.
    after, _ = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: solver.update(s, batch), s, None, length=2)
    )(state)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
    assert int(after.step) == 2


class Stateful:
    """A stateful problem whose model state counts its steps."""

    @staticmethod
    def inner(z, x, batch, model_state, rng):
        noise = jax.random.normal(rng, z.shape)
        loss = jnp.sum((z - x * batch + noise) ** 2)
        return loss, bf.Aux({"seen": model_state["seen"] + 1}, {"loss": loss})

    @staticmethod
    def outer(z, x, batch, model_state, rng):
        return jnp.sum(z * batch), bf.Aux({"seen": model_state["seen"] + 100})


@pytest.mark.parametrize(
    ("side", "finite"), [("inner", (False, True, False)), ("outer", (True, False, True))]
)
def test_a_batch_that_is_not_finite_freezes_everything(side, finite):
    problem = bf.Problem(Stateful.inner, Stateful.outer, stateful=True)
    solver = bf.soba(problem, inner=optax.adam(0.1), outer=optax.adam(0.1))
    state = solver.init(jnp.ones(2), jnp.ones(2), model_state={"seen": jnp.int32(0)})
    good = bf.Batch(jnp.ones(2), jnp.ones(2))
    step = jax.jit(solver.update)
    state, info = step(state, good)
    assert all(info.finite) and int(state.model_state["seen"]) == 1
    assert info.metrics["inner_loss"] == info.inner_loss
    state = state.replace(adjoint=jnp.ones(2))
    for poison in (jnp.nan, jnp.inf):
        frozen, info = step(state, good._replace(**{side: jnp.array([1.0, poison])}))
        same_bits(frozen, state)
        if jnp.isnan(poison):
            assert tuple(bool(flag) for flag in info.finite) == finite
        assert not all(info.finite)
    after, info = step(frozen, good)
    assert all(info.finite) and int(after.step) == 2


def test_the_outer_losss_state_is_kept_when_asked_for():
    problem = bf.Problem(Stateful.inner, Stateful.outer, stateful=True, outer_updates_state=True)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(jnp.ones(2), jnp.ones(2), model_state={"seen": jnp.int32(0)})
    state, _ = jax.jit(solver.update)(state, bf.Batch(jnp.ones(2), jnp.ones(2)))
    assert int(state.model_state["seen"]) == 101


def test_the_adjoint_optimiser_is_handed_the_inner_ones_state():
    """RMSProp on z, and the same preconditioner on v."""
    task = quadratics()

    def update(direction, state, params=None, *, inner_opt_state, **extra_args):
        square = inner_opt_state[0].nu
        return jax.tree.map(lambda d, s: -0.1 * d / (jnp.sqrt(s) + 1), direction, square), state

    adjoint = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    solver = bf.soba(task.problem, inner=optax.rmsprop(0.1), outer=optax.sgd(0.1), adjoint=adjoint)
    state = solver.init(task.inner_params, task.outer_params)
    step = jax.jit(lambda s: solver.update(s, task.batch(0, 0))[0])
    state = step(state)
    found = directions(
        jax.jit(lambda: oracles.evaluate(task.problem, state.variables, task.batch(0, 0)))()
    )
    square = state.inner_opt_state[0].nu
    expected = jax.tree.map(
        lambda v, d, s: v - 0.1 * d / (jnp.sqrt(s) + 1), state.adjoint, found.adjoint, square
    )
    assert all(float(leaf.max()) > 0 for leaf in jax.tree.leaves(square))
    assert gap(step(state).adjoint, expected) < 1e-6


def test_info_reports_losses_norms_and_the_residual(x64):
    task = quadratics()
    point = task.random_variables(2)
    solver = unit_soba(task)
    state = solver.init(point.inner, point.outer).replace(adjoint=point.adjoint)
    batch = task.batch(1, 2)

    @jax.jit
    def run():
        return solver.update(state, batch)[1], oracles.evaluate(task.problem, point, batch)

    info, found = run()
    size = lambda tree: np.linalg.norm(jax.flatten_util.ravel_pytree(tree)[0])
    z, _, x = point
    np.testing.assert_allclose(info.inner_loss, task.problem.inner_loss(z, x, batch.inner))
    np.testing.assert_allclose(info.outer_loss, task.problem.outer_loss(z, x, batch.outer))
    for name, part in directions(found)._asdict().items():
        np.testing.assert_allclose(getattr(info.norms, name), size(part), rtol=1e-6)
    residual = size(directions(found).adjoint) / size(found.outer_grad_inner)
    np.testing.assert_allclose(info.adjoint_residual, residual, rtol=1e-6)
    assert float(info.oracle_units) == solver.units == 4


# What users get wrong. Nothing is compiled: the errors come at trace time.


def quadratic(z, x, batch):
    return jnp.sum((z - jnp.sum(x["used"])) ** 2)


def refused(error, match, inner=quadratic, outer=quadratic, *, x=None, batch=None, **options):
    """Asserts that one update of SOBA is refused with one clear line."""
    declared = options.pop("per_sample", None)
    problem = bf.Problem(inner, outer, per_sample=declared, stateful=options.pop("stateful", False))
    x = {"used": jnp.ones(4)} if x is None else x
    batch = bf.Batch({"a": jnp.ones(2)}, {"a": jnp.ones(2)}) if batch is None else batch
    with pytest.raises(error, match=match) as caught:
        solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1), **options)
        state = solver.init(jnp.ones(2), x)
        jax.eval_shape(solver.update, state, batch)
    assert "\n" not in str(caught.value)


def test_an_outer_parameter_that_the_inner_loss_never_uses():
    refused(
        ValueError,
        r"inner_loss never uses outer_params\['idle'\]\[1\]",
        x={"used": jnp.ones(4), "idle": [3, jnp.ones(2)]},
    )


def test_losses_that_are_no_scalars():
    vector = lambda z, x, batch: (z - jnp.sum(x["used"])) ** 2
    refused(TypeError, r"inner_loss must return a real scalar, got shape \(2,\)", inner=vector)
    refused(TypeError, r"outer_loss must return a real scalar, got shape \(2,\)", outer=vector)
    integer = lambda z, x, batch: jnp.sum(quadratic(z, x, batch).astype(int))
    refused(TypeError, "inner_loss must return a real scalar.*int32", inner=integer)
    pair = lambda *args: (quadratic(*args), {})
    refused(TypeError, r"stateful=True", inner=pair)
    refused(TypeError, "must return \\(loss, bilevel_flax.Aux", inner=lambda z, x, b, s, r: (
        quadratic(z, x, b), {}), stateful=True)  # fmt: skip


def weighted(z, x, batch):
    return jnp.sum(x["used"]) * jnp.sum(z**2)


def test_per_sample_weights_without_or_with_a_wrong_index():
    declared = {"used": True}
    outer_loss = lambda z, x, batch: jnp.sum(z)
    refused(
        ValueError, r'need batch\["index"\].*\[\'a\'\]', weighted, outer_loss, per_sample=declared
    )
    floats = bf.Batch({"index": jnp.ones(2)}, {})
    refused(TypeError, "must be integers", weighted, outer_loss, batch=floats, per_sample=declared)
    refused(ValueError, "need batch.*has tuple", weighted, outer_loss, per_sample=declared,
            batch=bf.Batch((jnp.ones(2),), {}))  # fmt: skip


@pytest.mark.parametrize("wrong", [4, -1, 2**31 - 1])
@pytest.mark.parametrize("declared", [True, False], ids=["sigmoid", "softmax"])
def test_an_index_out_of_range_stops_the_run_and_moves_no_row(wrong, declared):
    weights = outer.sigmoid(4) if declared else outer.softmax(4)
    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(weights.apply(x, batch) * (jnp.sum(z) - 1) ** 2),
        lambda z, x, batch: jnp.sum(z**2),
        per_sample=weights.per_sample,
    )
    for optimiser in (optax.sgd(1.0), outer.lazy_sgd(1.0)):
        solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optimiser)
        state = solver.init(jnp.ones(2), weights.init()).replace(adjoint=jnp.ones(2))
        step = jax.jit(solver.update)
        moved, info = step(state, bf.Batch({"index": jnp.array([1, 3])}, {}))
        assert all(info.finite) and bool((moved.outer_params != state.outer_params).any())
        frozen, info = step(state, bf.Batch({"index": jnp.array([1, wrong])}, {}))
        assert not any((info.finite.inner, info.finite.outer))
        same_bits(frozen, state)


def test_padding_moves_no_row_whatever_its_index():
    problem = bf.Problem(
        lambda z, x, batch: bf.masked_mean(jax.nn.sigmoid(x), batch["mask"]) * jnp.sum(z**2),
        lambda z, x, batch: jnp.sum(z),
        per_sample=True,
    )
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.adam(0.1))
    state = solver.init(jnp.ones(2), jnp.zeros(4)).replace(adjoint=jnp.ones(2))
    step = jax.jit(solver.update)
    for index in ([2, 0, 0], [2, 4, -1], [2, 2, 2]):
        batch = {"index": jnp.array(index), "mask": jnp.array([1.0, 0.0, 0.0])}
        after, info = step(state, bf.Batch(batch, {}))
        assert all(info.finite)
        np.testing.assert_array_equal(after.outer_params != 0, [False, False, True, False])


def test_an_outer_loss_that_uses_a_per_sample_leaf():
    batch = bf.Batch({"index": jnp.arange(2)}, {})
    uses = (
        jnp.mean,
        lambda w: jnp.sum(jax.nn.sigmoid(w)),
        lambda w: w[0],
        lambda w: 1 - w,
        lambda w: w.sum(),
        lambda w: jnp.where(w > 0, 1.0, 0.0),
        lambda w: jnp.ones(4) @ w,
        lambda w: w == 1,
        optax.tree.norm,
    )
    for use in uses:
        refused(
            ValueError,
            r"outer_loss uses a per-sample leaf of outer_params \(shape \(4,\)\)",
            weighted,
            lambda z, x, batch, use=use: jnp.sum(z) + jnp.sum(use(x["used"])),
            batch=batch,
            per_sample={"used": True},
        )


def test_a_per_sample_mask_that_does_not_fit():
    refused(ValueError, "is not a pytree prefix of outer_params", per_sample={"weights": True})
    refused(ValueError, "is not a pytree prefix of outer_params", per_sample=[True])
    refused(ValueError, r"float array \[n, \.\.\.\].*float32\(\)", x={"used": jnp.float32(1)},
            per_sample=True)  # fmt: skip
    refused(ValueError, r"float array \[n, \.\.\.\].*int32\(4,\)", per_sample=True,
            x={"used": jnp.ones(4), "ids": jnp.arange(4)})  # fmt: skip


def test_an_adjoint_of_another_tree_shape_or_dtype():
    problem = bf.Problem(quadratic, quadratic)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(jnp.ones(2), {"used": jnp.ones(4)})
    batch = bf.Batch(jnp.ones(2), jnp.ones(2))
    for wrong, match in (
        ({"a": jnp.ones(2)}, "the adjoint's tree differs"),
        (jnp.ones(3), r"float32\(3,\), inner_params' is float32\(2,\)"),
        (jnp.ones(2, jnp.bfloat16), "bfloat16"),
    ):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(solver.update, state.replace(adjoint=wrong), batch)


def test_minibatch_weights_without_ids():
    half = np.array([0.5, 0.5])
    refused(ValueError, "batch.inner_id is None, but soba", inner_weights=half)
    refused(ValueError, "batch.outer_id is None, but soba", outer_weights=half)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([0.5, 0.6], "sum to 1 .*1.1"),
        ([1.0, 0.0], "positive shares"),
        ([[1.0]], r"got shape \(1, 1\)"),
        ([], r"got shape \(0,\)"),
        ([np.nan, 1.0], "positive shares"),
        (0.5, r"got shape \(\)"),
    ],
)
def test_minibatch_weights_that_are_no_shares(weights, match):
    refused(ValueError, f"inner_weights must .*{match}", inner_weights=weights)
    refused(ValueError, f"outer_weights must .*{match}", outer_weights=weights)


def test_parameters_that_cannot_be_learned():
    refused(ValueError, "outer_params has no floating-point leaf", x={"used": jnp.arange(4)})
    refused(ValueError, "outer_params has no floating-point leaf", x={})
    refused(TypeError, r"outer_params\['name'\] is a str", x={"used": jnp.ones(4), "name": "a"})


def test_a_problem_checks_its_arguments():
    with pytest.raises(TypeError, match="outer_loss must be a function, got 3"):
        bf.Problem(quadratic, 3)
    with pytest.raises(ValueError, match="derivatives='fast' is unknown; choose one of"):
        bf.Problem(quadratic, quadratic, derivatives="fast")


# Ready-made sample weights.


def test_sigmoid_weights():
    weights = outer.sigmoid(5)
    assert weights.per_sample is True
    np.testing.assert_array_equal(weights.init(), np.full(5, -2.0, np.float32))
    x = jnp.linspace(-3, 3, 5)
    np.testing.assert_allclose(weights.weights(x), 1 / (1 + np.exp(-np.asarray(x))), rtol=1e-6)
    taken = jnp.array([4, 0])
    gathered = rows.gather(True, x, {"index": taken})
    np.testing.assert_array_equal(
        weights.apply(gathered, {"index": taken}), weights.weights(x)[taken]
    )


def test_softmax_weights_have_mean_one_and_couple_all_examples():
    weights = outer.softmax(5)
    assert weights.per_sample is False
    np.testing.assert_allclose(weights.weights(weights.init()), np.ones(5), rtol=1e-6)
    # Large logits must not overflow.
    x = jnp.array([300.0, 300.0, -300.0, 299.0, 0.0])
    np.testing.assert_allclose(weights.weights(x).mean(), 1.0, rtol=1e-6)
    batch = {"index": jnp.array([3, 0])}
    np.testing.assert_allclose(
        weights.apply(x, batch), weights.weights(x)[batch["index"]], rtol=1e-5
    )
    gradient = jax.grad(lambda x: weights.apply(x, {"index": jnp.array([0])})[0])(jnp.zeros(5))
    np.testing.assert_allclose(gradient, [0.8, -0.2, -0.2, -0.2, -0.2], rtol=1e-5)
    with pytest.raises(ValueError, match=r'softmax weights need batch\["index"\].*\[\'images\'\]'):
        weights.apply(x, {"images": jnp.ones(2)})


@pytest.mark.parametrize("count", [0, -1, 2.0, "3"])
def test_a_number_of_samples_that_is_none(count):
    for make in (outer.sigmoid, outer.softmax):
        with pytest.raises(ValueError, match="num_samples must be an integer >= 1"):
            make(count)


def test_learned_weights_tell_wrong_labels_apart():
    """A tiny hypercleaning: two of eight labels are flipped, and their weights fall."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(8, 2)).astype(np.float32)
    labels = np.sign(inputs[:, 0]).astype(np.float32)
    clean = {"inputs": jnp.asarray(inputs), "labels": jnp.asarray(labels)}
    noisy = {
        **clean,
        "labels": clean["labels"].at[jnp.array([2, 5])].mul(-1),
        "index": jnp.arange(8),
    }
    weights = outer.sigmoid(8, init=0.0)

    def nll(z, batch):
        return jax.nn.softplus(-batch["labels"] * (batch["inputs"] @ z))

    problem = bf.Problem(
        lambda z, x, batch: (
            jnp.mean(weights.apply(x, batch) * nll(z, batch)) + 0.05 * jnp.sum(z**2)
        ),
        lambda z, x, batch: jnp.mean(nll(z, batch)),
        per_sample=weights.per_sample,
    )
    solver = bf.soba(problem, inner=optax.sgd(0.5), outer=outer.lazy_sgd(3.0))
    state = solver.init(jnp.zeros(2), weights.init())
    step = lambda s, _: (solver.update(s, bf.Batch(noisy, clean))[0], None)
    state = jax.jit(lambda s: jax.lax.scan(step, s, None, length=300)[0])(state)
    found = np.asarray(weights.weights(state.outer_params))
    wrong = np.isin(np.arange(8), [2, 5])
    assert found[wrong].max() < 0.2 < 0.5 < found[~wrong].min()


def test_the_way_from_the_step_to_its_derivative_is_short(monkeypatch):
    """What a reader goes through from `solver.update` to `jax.jvp`."""
    frames, derive = [], jax.jvp

    def recorded(*args, **kwargs):
        stack = traceback.extract_stack()[:-1]
        frames.append([(f.filename, f.name) for f in stack if "/bilevel_flax/" in f.filename])
        return derive(*args, **kwargs)

    monkeypatch.setattr(jax, "jvp", recorded)
    solver = bf.soba(bf.Problem(quadratic, quadratic), inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    batch = {"a": jnp.ones(2)}
    start = solver.init(jnp.ones(2), {"used": jnp.ones(2)})
    jax.eval_shape(solver.update, start, bf.Batch(batch, batch))
    (way,) = frames
    assert [name for _, name in way][0] == "update"
    assert len(way) <= 6 and len({file for file, _ in way}) <= 5


def test_the_records_are_small():
    assert len(dataclasses.fields(bf.Problem)) <= 7
    assert len(bf.Estimator._fields) <= 6 and len(bf.BilevelSolver._fields) <= 6
