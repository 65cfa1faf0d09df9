"""bf.auto: v's system, unbiased cheap steps, the scale-free step of x."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.outer import robust_sgd
from bilevel_flax.solvers import cheap_steps

A = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.6]])
B = np.array([[1.0, 0.3], [-0.4, 0.8], [0.2, -1.0]])
X = np.array([0.7, -1.2])
TARGET = np.array([1.0, -2.0, 0.5])
OPTIMISERS = {
    "sgd": lambda lr: optax.sgd(lr),
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "adam": lambda lr: optax.adam(lr),
    "rmsprop": lambda lr: optax.rmsprop(lr),
    "clipped": lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)),
}


def quadratic():
    """G = ½zᵀAz - zᵀBx, F = ½‖z - target‖²: v* = -A⁻¹(z* - target), ∇h = -Bᵀv*."""
    return bf.Problem(
        inner_loss=lambda z, x, batch: 0.5 * z @ A @ z - z @ (B @ x),
        outer_loss=lambda z, x, batch: 0.5 * jnp.sum((z - TARGET) ** 2),
    )


def solved(damping=0.0):
    z = np.linalg.solve(A, B @ X)
    return z, np.linalg.solve(A + damping * np.eye(3), TARGET - z)


def run(solver, steps, z=None):
    z = np.zeros(3) if z is None else z

    def body(state, _):
        return solver.update(state, bf.Batch(jnp.zeros(1), jnp.zeros(1)))

    return jax.jit(lambda z, x: jax.lax.scan(body, solver.init(z, x), None, length=steps))(
        np.float32(z), np.float32(X)
    )


@pytest.mark.parametrize("name", OPTIMISERS)
def test_fixed_point_is_v_star_whatever_the_preconditioner(name):
    inner = OPTIMISERS[name](optax.cosine_decay_schedule(0.03, 4000))
    solver = bf.auto(quadratic(), inner=inner, steps=4000, dense_learning_rate=0.0)
    state, _ = run(solver, 4000)
    z, v = solved()
    np.testing.assert_allclose(state.inner_params, z, atol=2e-3)
    np.testing.assert_allclose(state.adjoint, v, atol=5e-3)


def test_hypergradient_error_vanishes_with_the_damping():
    z, v = solved()
    exact = -B.T @ v
    errors = []
    for damping in (0.3, 0.03, 0.003, 0.0):
        solver = bf.auto(
            quadratic(), inner=optax.sgd(0.5), steps=10**6, dense_learning_rate=0.0, damping=damping
        )
        state, _ = run(solver, 400, z)
        np.testing.assert_allclose(state.adjoint, solved(damping)[1], atol=1e-4)
        cross_jvp = -B.T @ np.asarray(state.adjoint)
        errors.append(np.linalg.norm(cross_jvp - exact) / np.linalg.norm(exact))
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0
    assert errors[3] < 1e-5


def cleaning(n=24, batch=8, ragged=False, seed=0):
    """Weighted logistic regression, a third of the labels flipped, in minibatches of `batch`."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=3)
    features = rng.normal(size=(n, 3)).astype(np.float32)
    labels = np.sign(features @ truth).astype(np.float32)
    wrong = rng.random(n) < 1 / 3
    labels = np.where(wrong, -labels, labels)

    def inner_loss(z, x, batch):
        losses = jax.nn.sigmoid(x) * jax.nn.softplus(-batch["b"] * (batch["a"] @ z))
        return bf.masked_mean(losses, batch.get("mask")) + 0.05 * z @ z

    def outer_loss(z, x, batch):
        return bf.masked_mean(jax.nn.softplus(-batch["b"] * (batch["a"] @ z)), batch.get("mask"))

    problem = bf.Problem(inner_loss, outer_loss, per_sample=True)
    data = {"a": features, "b": labels, "index": np.arange(n, dtype=np.int32)}
    if ragged:
        data["mask"] = (np.arange(n) % batch < batch - 3).astype(np.float32)
    inner = jax.tree.map(lambda leaf: leaf.reshape(n // batch, batch, *leaf.shape[1:]), data)
    held = rng.normal(size=(n, 3)).astype(np.float32)
    outer = {"a": held, "b": np.sign(held @ truth).astype(np.float32)}
    if ragged:
        outer["mask"] = (np.arange(n) % batch < batch - 1).astype(np.float32)
    outer = jax.tree.map(lambda leaf: leaf.reshape(n // batch, batch, *leaf.shape[1:]), outer)
    return problem, inner, outer, wrong


def minibatch(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_blocks_average_to_the_whole_minibatch(parts, ragged):
    problem, inner, outer, _ = cleaning(ragged=ragged)
    rng = np.random.default_rng(1)
    point = bf.Variables(*(jnp.asarray(rng.normal(size=k), jnp.float32) for k in (3, 3, 24)))
    batch = bf.Batch(minibatch(inner, 1), minibatch(outer, 2))

    def dense(found):
        return found._replace(cross_jvp=rows.densify(found.cross_jvp, point.outer))

    @jax.jit
    def of_block(block):
        at = (problem, point, batch)
        return dense(oracles.evaluate_subsample(*at, block=block, parts=parts).oracles)

    whole = jax.jit(lambda: dense(oracles.evaluate_all(problem, point, batch).oracles))()
    found = [of_block(b) for b in range(parts)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / parts, *found)
    for name in ("inner_grad", "hvp", "cross_jvp", "outer_grad_inner"):
        np.testing.assert_allclose(
            getattr(mean, name), getattr(whole, name), rtol=2e-4, atol=2e-5, err_msg=name
        )
    assert not np.allclose(found[0].hvp, whole.hvp, rtol=1e-3)  # a block alone is another number


def test_every_block_is_drawn_about_equally_often():
    problem, inner, outer, _ = cleaning()
    point = bf.Variables(jnp.ones(3), jnp.ones(3), jnp.zeros(24))
    batch = bf.Batch(minibatch(inner, 0), minibatch(outer, 0))
    estimator = cheap_steps.estimator(0.25)

    @jax.jit
    def step(memory, _):
        oracle = oracles.Oracle(problem, batch, None, (None, None))
        estimate = estimator.update(oracle, point, batch, memory)
        return estimate.state, estimate.directions.outer.index[0]

    _, first = jax.lax.scan(step, estimator.init(point), None, length=2000)
    blocks, counts = np.unique(np.asarray(first), return_counts=True)
    assert blocks.tolist() == [0, 2, 4, 6]
    assert (np.abs(counts / 2000 - 0.25) < 0.04).all()


def test_directions_of_every_kth_step_are_unbiased():
    problem, inner, outer, _ = cleaning()
    rng = np.random.default_rng(2)
    point = bf.Variables(*(jnp.asarray(rng.normal(size=k), jnp.float32) for k in (3, 3, 24)))
    estimator = cheap_steps.estimator(update_every=3)
    memory = estimator.init(point)._replace(count=jnp.int32(6))

    @jax.jit
    def directions(batch):
        oracle = oracles.Oracle(problem, batch, None, (None, None))
        found = estimator.update(oracle, point, batch, memory).directions
        return found._replace(outer=rows.densify(found.outer, point.outer))

    pairs = [bf.Batch(minibatch(inner, i), minibatch(outer, j)) for i in range(3) for j in range(3)]
    mean = jax.tree.map(lambda *d: sum(d) / 9, *map(directions, pairs))

    flat = [
        jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), side)
        for side in (inner, outer)
    ]
    whole = jax.jit(lambda: oracles.evaluate_all(problem, point, bf.Batch(*flat)).oracles)()
    np.testing.assert_allclose(mean.inner, whole.inner_grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        mean.adjoint, whole.hvp + whole.outer_grad_inner, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        mean.outer, rows.densify(whole.cross_jvp, point.outer), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dense", [False, True], ids=["weights", "and a penalty"])
def test_d_x_without_hv_is_that_of_the_full_evaluation(dense):
    weights, inner, outer, _ = cleaning(ragged=True)

    def inner_loss(z, x, batch):
        return weights.inner_loss(z, x["weights"], batch) + jnp.exp(x["penalty"]) * (z**2).sum()

    def outer_loss(z, x, batch):
        return weights.outer_loss(z, None, batch) + (x["penalty"] * z.sum()) ** 2

    rng = np.random.default_rng(3)
    z, v, x = (jnp.asarray(rng.normal(size=k), jnp.float32) for k in (3, 3, 24))
    problem = weights
    if dense:
        problem = bf.Problem(inner_loss, outer_loss, per_sample={"weights": True, "penalty": False})
        x = {"weights": x, "penalty": jnp.float32(-1.5)}
    args = (problem, bf.Variables(z, v, x), bf.Batch(minibatch(inner, 2), minibatch(outer, 1)))
    whole, found = jax.jit(
        lambda: (oracles.evaluate_all(*args), oracles.evaluate_without_hvp(*args))
    )()
    for name in ("inner_grad", "cross_jvp", "outer_grad_outer"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            getattr(found.oracles, name),
            getattr(whole.oracles, name),
        )
    if dense:
        assert abs(float(found.oracles.cross_jvp["penalty"])) > 0.01
    assert found.oracles.hvp is None and found.oracles.outer_grad_inner is None
    np.testing.assert_allclose(found.inner_loss, whole.inner_loss, rtol=1e-6)


def test_d_x_without_hv_costs_two_thirds_of_a_gradient():
    width, depth = 64, 8

    def network(z, batch):
        out = batch["image"]
        for matrix in z:
            out = jnp.tanh(out @ matrix)
        return (out**2).sum(-1)

    problem = bf.Problem(
        lambda z, x, batch: (jax.nn.sigmoid(x) * network(z, batch)).mean(),
        lambda z, x, batch: network(z, batch).mean(),
        per_sample=True,
    )
    z = [jnp.eye(width)] * depth
    point = bf.Variables(z, z, jnp.zeros(100))
    batch = {"image": jnp.ones((32, width)), "index": jnp.arange(32)}

    def flops(function):
        compiled = jax.jit(function).lower(point, batch).compile()
        return compiled.cost_analysis()["flops"]

    gradient = flops(lambda p, b: oracles.inner_value_and_grad(problem, p.inner, p.outer, b)[1])
    forward = flops(lambda p, b: oracles.inner_grad_and_cross(problem, p, b)[1:])
    assert forward / gradient < 1.05 * oracles.FORWARD_UNITS
    # All three weigh 3: this is no accident of the compiler leaving things out.
    everything = flops(lambda p, b: oracles.inner_products(problem, p, b)[1:])
    assert everything / gradient > 2.5


@pytest.mark.parametrize("every", [1, 2])
def test_v_moves_more_seldom_than_x(every):
    problem, inner, held, _ = cleaning()
    optimiser = optax.adam(optax.linear_schedule(0.1, 0.0, 12))
    solver = bf.auto(problem, inner=optimiser, steps=12, update_every=every, adjoint_update_every=3)
    exact = bf.auto(problem, inner=optimiser, steps=12, update_every=every)
    assert solver.units == pytest.approx(1 + (3 + 2 * 2 / 3) / (3 * every))
    state = solver.init(jnp.zeros(3), jnp.zeros(24))
    update, all_of_it = jax.jit(solver.update), jax.jit(exact.update)
    for t in range(12):
        batch = bf.Batch(minibatch(inner, t % 3), minibatch(held, t % 3))
        before, (state, info) = state, update(state, batch)
        moves = bool(cheap_steps.moves_at(t, every))
        if not moves or t // every % 3:
            assert bool((before.adjoint == state.adjoint).all())
            kept, now = before.adjoint_opt_state.inner, state.adjoint_opt_state.inner
            assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), kept, now)))
        else:
            assert not bool((before.adjoint == state.adjoint).any())
        if t:  # v starts at 0, and with it D_x
            assert bool((before.outer_params == state.outer_params).all()) == (not moves)
        # x's step is that of a solver that leaves nothing out.
        fresh = exact.init(jnp.zeros(3), jnp.zeros(24))
        same, _ = all_of_it(
            before.replace(
                estimator_state=before.estimator_state if every > 1 else fresh.estimator_state,
                adjoint_opt_state=fresh.adjoint_opt_state,
            ),
            batch,
        )
        np.testing.assert_allclose(state.outer_params, same.outer_params, rtol=1e-5, atol=1e-6)
        assert np.isfinite(info.outer_loss) and np.isfinite(info.adjoint_residual)


def test_d_x_without_hv_needs_forward_mode():
    problem, inner, outer, _ = cleaning()
    problem = dataclasses.replace(problem, derivatives="reverse_over_reverse")
    solver = bf.auto(problem, inner=optax.sgd(0.1), steps=10, adjoint_update_every=2)
    batch = bf.Batch(minibatch(inner, 0), minibatch(outer, 0))
    with pytest.raises(ValueError, match="leave out adjoint_update_every"):
        solver.update(solver.init(jnp.zeros(3), jnp.zeros(24)), batch)


@pytest.mark.parametrize("outer", ["default", "lazy_adam", "dense"])
def test_between_updates_v_x_and_their_optimisers_stand_still(outer):
    problem, inner, held, _ = cleaning()
    chosen = {
        "default": None,
        "lazy_adam": bf.outer.lazy_adam(0.1),
        "dense": optax.adam(0.1),
    }[outer]
    optimiser = optax.adam(optax.linear_schedule(0.1, 0.0, 12))
    solver = bf.auto(problem, inner=optimiser, steps=12, update_every=3, outer=chosen)
    assert solver.units == 2.0
    state = solver.init(jnp.zeros(3), jnp.zeros(24))
    update = jax.jit(solver.update)
    moved = []
    due = [bool(cheap_steps.moves_at(t, 3)) for t in range(9)]
    for t in range(9):
        batch = bf.Batch(minibatch(inner, t % 3), minibatch(held, t % 3))
        before, (state, info) = state, update(state, batch)
        kept = (before.adjoint, before.adjoint_opt_state, before.outer_opt_state)
        now = (state.adjoint, state.adjoint_opt_state, state.outer_opt_state)
        same = [
            bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (kept, now)), strict=True)
        ]
        moved.append(not all(same))
        if t:  # v starts at 0, and with it D_x
            assert bool((before.outer_params == state.outer_params).all()) == (not due[t])
        assert not (before.inner_params == state.inner_params).all()
        assert np.isfinite(info.outer_loss) and np.isfinite(info.adjoint_residual)
    assert moved == due and sum(due) == 3
    counts = optax.tree.get_all_with_path(state.adjoint_opt_state, "count")
    last = max(t for t in range(9) if due[t])
    # Its schedule is on z's clock, its moments count their own updates.
    assert {int(value) for _, value in counts} == {3, last + 1}


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_outer_loss_does_not_matter(scale):
    problem, inner, outer, _ = cleaning()
    found = []
    for factor in (1.0, scale):
        scaled = bf.Problem(
            problem.inner_loss,
            lambda z, x, batch, c=factor: c * problem.outer_loss(z, x, batch),
            per_sample=True,
        )
        solver = bf.auto(scaled, inner=optax.sgd(0.05), steps=100)
        state = solver.init(jnp.zeros(3), jnp.zeros(24))
        update = jax.jit(solver.update)
        for t in range(3):
            batch = bf.Batch(minibatch(inner, t % 3), minibatch(outer, t % 3))
            state, _ = update(state, batch)
        found.append(np.asarray(state.outer_params))
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"subsample": 0.5}, {"update_every": 2}, {"adjoint_update_every": 4}]
)
@pytest.mark.parametrize("inner", [optax.sgd(0.05), optax.adamw(0.03)], ids=["sgd", "adamw"])
def test_finds_wrong_labels_with_nothing_tuned(inner, options):
    problem, parts, held, wrong = cleaning(n=96, batch=8, seed=3)
    steps = 600
    solver = bf.auto(problem, inner=inner, steps=steps, **options)
    state = solver.init(jnp.zeros(3), jnp.zeros(96))
    order = np.random.default_rng(0)
    picks = jnp.asarray(
        np.stack([order.permutation(12) for _ in range(steps // 12 + 1)]).ravel()[:steps]
    )

    batches = jax.tree.map(jnp.asarray, bf.Batch(parts, held))
    body = lambda state, i: solver.update(state, minibatch(batches, i))
    state, info = jax.jit(lambda s: jax.lax.scan(body, s, picks))(state)
    x = np.asarray(state.outer_params)
    assert bool(info.finite.adjoint.all())
    auc = (x[~wrong][:, None] > x[wrong]).mean()
    assert auc > 0.85  # examples near the boundary cannot be told


def test_x_stands_still_in_warm_up():
    problem, inner, outer, _ = cleaning()
    solver = bf.auto(problem, inner=optax.sgd(0.1), steps=10, warmup=0.3)
    state, update = solver.init(jnp.zeros(3), jnp.zeros(24)), jax.jit(solver.update)
    for t in range(4):
        assert (state.outer_params == 0).all()
        state, _ = update(state, bf.Batch(minibatch(inner, t % 3), minibatch(outer, t % 3)))
    assert (state.outer_params != 0).any()


@pytest.mark.parametrize("update_every", [1, 2])
def test_after_x_is_learned_z_trains_on_alone_at_the_cost_of_plain_training(update_every):
    problem, inner, outer, _ = cleaning()
    options = {"cooldown": 0.5, "update_every": update_every}
    solver = bf.auto(problem, inner=optax.sgd(0.1), steps=8, **options)
    assert solver.units == 1 + 0.5 * 3 / update_every
    state, update = solver.init(jnp.zeros(3), jnp.zeros(24)), jax.jit(solver.update)
    states = [state]
    for t in range(8):
        batch = bf.Batch(minibatch(inner, t % 3), minibatch(outer, t % 3))
        state, _ = update(state, batch)
        states.append(state)
    assert (states[4].outer_params != 0).any()
    for later in states[5:]:
        for name in ("outer_params", "outer_opt_state", "adjoint", "adjoint_opt_state"):
            before, after = (getattr(s, name) for s in (states[4], later))
            jax.tree.map(np.testing.assert_array_equal, before, after)
    # z makes plain steps on what was learned.
    here = minibatch(inner, 1)
    grad = jax.grad(problem.inner_loss)(
        states[4].inner_params, states[4].outer_params[here["index"]], here
    )
    np.testing.assert_allclose(
        states[5].inner_params, states[4].inner_params - 0.1 * grad, rtol=1e-5, atol=1e-7
    )


def test_the_model_state_goes_on_in_steps_of_every_kind():
    def inner_loss(z, x, batch, count, rng):
        return 0.5 * ((z - x) ** 2).sum(), bf.Aux(model_state=count + 1)

    def outer_loss(z, x, batch, count, rng):
        return 0.5 * ((z - 2.0) ** 2).sum(), bf.Aux()

    problem = bf.Problem(inner_loss, outer_loss, stateful=True)
    solver = bf.auto(problem, inner=optax.sgd(0.1), steps=12, cooldown=0.5, update_every=3)
    state = solver.init(jnp.zeros(2), jnp.zeros(2), model_state=jnp.int32(0))
    step = lambda state, _: solver.update(state, bf.Batch(jnp.zeros(1), jnp.zeros(1)))
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, None, length=12))(state)
    assert int(state.model_state) == 12


def test_v_is_kept_within_its_bound():
    transform = bf.adjoint.bounded(optax.sgd(1.0), 10.0)
    v, z = jnp.array([3.0, 4.0]), jnp.zeros(2)
    near, _ = transform.update(-jnp.ones(2), transform.init(v), v, inner_params=z)
    np.testing.assert_allclose(near, jnp.ones(2))
    far, _ = transform.update(-1e3 * v, transform.init(v), v, inner_params=z)
    np.testing.assert_allclose(v + far, jnp.array([6.0, 8.0]), rtol=1e-5)


def test_robust_step_ignores_outliers_and_padding():
    outer = robust_sgd(0.5, dense_learning_rate=0.1)
    x = {"w": jnp.zeros(10), "c": jnp.zeros(2)}
    state = outer.init({"w": bf.Table(x["w"]), "c": x["c"]})
    values = jnp.array([1.0, -1.0, 1e6, 1e30])
    direction = {"w": bf.Rows(jnp.array([3, 5, 7, 10]), values), "c": jnp.array([2.0, -2.0])}
    update, _ = outer.update(direction, state, x)
    assert update["w"].index.tolist() == [3, 5, 7, 10]
    np.testing.assert_allclose(update["w"].values[2], -0.5)  # the clip, not the padded row's 1e30
    assert abs(float(update["w"].values[0])) < 1e-5
    np.testing.assert_allclose(update["c"], jnp.array([-0.1, 0.1]), rtol=1e-6)


def test_no_direction_no_move():
    outer = robust_sgd(0.5)
    update, _ = outer.update(jnp.zeros(3), outer.init(jnp.zeros(3)), jnp.zeros(3))
    assert (update == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"cooldown": 1.0}, "cooldown=1.0"),
        ({"cooldown": -0.1}, "cooldown=-0.1"),
        ({"cooldown": 0.6, "warmup": 0.5}, "warmup=0.5 and cooldown=0.6 leave no steps"),
        ({"subsample": 0.3}, "subsample=0.3"),
        ({"update_every": 0}, "update_every must be .* got 0"),
        ({"adjoint_update_every": 1.5}, "adjoint_update_every must be .* got 1.5"),
        (
            {"adjoint_update_every": 2, "subsample": 0.5},
            "subsample=0.5 with adjoint_update_every=2",
        ),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bf.auto(quadratic(), **({"inner": optax.sgd(0.1), "steps": 10} | options))


@pytest.mark.parametrize("cheap", [{"subsample": 0.5}, {"update_every": 2}])
def test_estimators_with_memory_refuse_cheap_steps(cheap):
    from bilevel_flax.contrib.masoba import estimator

    with pytest.raises(ValueError, match="memory"):
        bf.auto(
            quadratic(),
            inner=optax.sgd(0.1),
            steps=10,
            estimator=estimator(quadratic(), 0.1),
            **cheap,
        )


def test_a_minibatch_that_cannot_be_cut_is_named():
    problem, inner, outer, _ = cleaning()
    solver = bf.auto(problem, inner=optax.sgd(0.1), steps=10, subsample=1 / 3)
    state = solver.init(jnp.zeros(3), jnp.zeros(24))
    with pytest.raises(ValueError, match="1/3"):
        solver.update(state, bf.Batch(minibatch(inner, 0), minibatch(outer, 0)))


def test_the_cost_is_the_configured_one():
    assert bf.auto(quadratic(), inner=optax.sgd(0.1), steps=10).units == 4
    solver = bf.auto(quadratic(), inner=optax.sgd(0.1), steps=10, subsample=0.25, update_every=3)
    assert solver.units == 1.25


def test_what_rests_is_not_copied():
    """A variable that stands still must not cost passes over memory: more than half of an MLP's."""

    def residuals(z, batch):
        return jnp.sum((jnp.tanh(batch["a"] @ z) - batch["y"]) ** 2, -1)

    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(jax.nn.sigmoid(x) * residuals(z, batch)),
        lambda z, x, batch: jnp.mean(residuals(z, batch)),
        per_sample=True,
    )
    batches = {
        "a": jnp.ones((4, 16, 96)),
        "y": jnp.ones((4, 16, 80)),
        "index": jnp.arange(64, dtype=jnp.int32).reshape(4, 16),
    }

    def copies(solver):
        @functools.partial(jax.jit, donate_argnums=0)
        def chunk(state, batches):
            return jax.lax.scan(
                lambda state, one: solver.update(state, bf.Batch(one, one)), state, batches
            )

        state = solver.init(jnp.ones((96, 80)), jnp.zeros(64))
        text = chunk.lower(state, batches).compile().as_text()
        return [len(re.findall(rf"= f32\[{n}\]\S* copy\(", text)) for n in ("96,80", "64")]

    inner = optax.adamw(1e-3)
    _, of_x = copies(bf.soba(problem, inner=inner, outer=bf.outer.lazy_sgd(0.1)))
    cheap_z, cheap_x = copies(
        bf.auto(problem, inner=inner, steps=100, update_every=4, adjoint_update_every=2)
    )
    assert cheap_z <= 1  # 9 where a branch hands v and its moments through
    assert cheap_x <= of_x


def test_old_names_of_cheap_steps_go_on_with_a_warning():
    with pytest.warns(DeprecationWarning, match="auto\\(every=\\) is now update_every="):
        solver = bf.auto(quadratic(), inner=optax.sgd(0.1), steps=10, every=2)
    assert solver.units == 2.5


def test_a_fixed_order_of_minibatches_starves_no_row():
    """With x in one of two steps, minibatches 0, 1, 0, 1, ... must both be met."""
    moved = np.array([bool(cheap_steps.moves_at(t, 2)) for t in range(400)])
    assert moved.reshape(-1, 2).sum(1).tolist() == [1] * 200
    assert 60 < moved[::2].sum() < 140


def test_a_traced_learning_rate_is_refused_in_words():
    def init(rate):
        problem = bf.Problem(lambda z, x, b: (z - x) ** 2, lambda z, x, b: z**2)
        return bf.auto(problem, inner=optax.adam(rate), steps=3).init(jnp.ones(()), jnp.ones(()))

    with pytest.raises(ValueError, match="under vmap or jit.*pass adjoint="):
        jax.vmap(init)(jnp.array([0.1, 0.2]))
