"""The methods with their own loop: hypergradients, bias, per-sample rows, state, cost, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transcriptions
from nested_test import NUM_INNER, NUM_OUTER, SIZE, Run, problem_of
from problems import logistic, quadratics

import bilevel_flax as bf
from bilevel_flax import contrib
from bilevel_flax.solvers.nested import linear_solves as adjoints

FIVE = {"inner_steps": 2, "adjoint_steps": 3}
SERIES = FIVE | {"adjoint_step": 0.2}
COUNTS = {"num_inner_batches": 4, "num_outer_batches": 3}
METHODS = {
    "amigo": functools.partial(bf.amigo, **FIVE),
    "stocbio": functools.partial(bf.stocbio, **SERIES),
    "bsa": functools.partial(contrib.bsa, **SERIES),
    "ttsa": functools.partial(contrib.ttsa, adjoint_steps=3, adjoint_step=0.2),
    "mrbo": functools.partial(contrib.mrbo, adjoint_steps=3, adjoint_step=0.2),
    "sustain": functools.partial(contrib.sustain, adjoint_steps=3, adjoint_step=0.2),
    "vrbo": functools.partial(contrib.vrbo, **SERIES, period=2, **COUNTS),
    "f2sa": functools.partial(bf.f2sa, inner_steps=2),
    "implicit": functools.partial(bf.implicit, **FIVE),
    "bsg": functools.partial(contrib.bsg, **FIVE),
    "bsgo": functools.partial(contrib.bsgo, **FIVE),
    "unrolled": functools.partial(bf.unrolled, inner_steps=2),
}


def tiled(batch, times):
    """The same minibatch on a leading axis."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], times, axis=0), batch)


def d_x_of(solver, state, batch):
    """The direction of x, for an outer optimiser of optax.sgd(1)."""
    after, info = jax.jit(solver.update)(state, batch)
    return jax.tree.map(lambda a, b: a - b, state.outer_params, after.outer_params), after, info


def test_implicit_cg_is_the_dense_implicit_gradient(x64):
    data = transcriptions.smooth()
    problem, inner, outer = problem_of(data)
    solver = bf.implicit(
        problem,
        inner=optax.sgd(0.1),
        outer=optax.sgd(1.0),
        inner_steps=2,
        adjoint_steps=SIZE,
        inner_weights=data.inner_weights,
        outer_weights=data.outer_weights,
    )
    run = Run(solver, inner, outer)
    state = solver.init(jnp.linspace(-1.0, 1.0, SIZE), jnp.linspace(0.5, -0.5, SIZE))
    after, info = run.update(state, np.int32([0, 1, 2]), np.int32([1]))
    z, x = np.asarray(after.inner_params), np.asarray(state.outer_params)
    v = -np.linalg.solve(data.H(2, z, x), data.f1(1, z, x))
    expected = data.J(2, z, x).T @ v + data.f2(1, z, x)
    np.testing.assert_allclose(x - np.asarray(after.outer_params), expected, rtol=1e-9)
    np.testing.assert_allclose(after.adjoint, v, rtol=1e-9)
    assert float(info.adjoint_residual) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(bf.implicit, inner_steps=120, adjoint_steps=7),
        functools.partial(contrib.bsg, inner_steps=120, adjoint_steps=7),
        functools.partial(bf.stocbio, inner_steps=120, adjoint_steps=120, adjoint_step=0.3),
        functools.partial(bf.amigo, inner_steps=120, adjoint_steps=120),
        functools.partial(bf.unrolled, inner_steps=120),
    ],
    ids=["implicit", "bsg", "stocbio", "amigo", "unrolled"],
)
def test_a_solved_inner_problem_gives_the_closed_form_gradient(make, x64):
    data = quadratics(num_inner=1, num_outer=1, batch=4)
    solver = make(data.problem, inner=optax.sgd(0.3), outer=optax.sgd(1.0))
    batch = data.batch(0, 0)
    if solver.batches != (1, 1):
        batch = bf.Batch(
            *(tiled(side, k) for side, k in zip(batch[:2], solver.batches, strict=True))
        )
    state = solver.init(data.inner_params, data.outer_params)
    found, *_ = jax.jit(functools.partial(d_x_of, solver))(state, batch)
    expected = data.grad_h(data.outer_params)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-8)


def test_unrolled_is_the_finite_difference_of_the_rollout(x64):
    data = transcriptions.smooth()
    problem, inner, outer = problem_of(data)
    solver = bf.unrolled(problem, inner=optax.sgd(0.1), outer=optax.sgd(1.0), inner_steps=3)
    z, x, ids = np.linspace(-1, 1, SIZE), np.linspace(0.5, -0.5, SIZE), np.int32([4, 0, 2])
    state = solver.init(jnp.asarray(z), jnp.asarray(x))
    after, info = Run(solver, inner, outer).update(state, ids, np.int32([1]))
    unweighted = dataclasses.replace(
        data, inner_weights=np.full(NUM_INNER, 0.2), outer_weights=np.full(NUM_OUTER, 1 / 3)
    )

    def value(x):
        end = z
        for i in ids:
            end = end - 0.1 * unweighted.g1(i, end, x)
        return unweighted.F(1, end, x)

    eps = 1e-6
    expected = [(value(x + eps * e) - value(x - eps * e)) / (2 * eps) for e in np.eye(SIZE)]
    np.testing.assert_allclose(x - np.asarray(after.outer_params), expected, rtol=1e-7)
    assert float(info.adjoint_residual) == 1.0
    np.testing.assert_array_equal(after.adjoint, 0.0)


def test_unrolled_through_a_zero_gradient_is_finite(x64):
    problem = bf.Problem(
        lambda z, x, batch: 0.5 * jnp.sum((z - x) ** 2),
        lambda z, x, batch: 0.5 * jnp.sum((z - 1.0) ** 2),
    )
    solver = bf.unrolled(problem, inner=optax.sgd(0.5), outer=optax.sgd(1.0), inner_steps=2)
    state = solver.init(jnp.zeros(2), jnp.zeros(2))
    found, _, info = d_x_of(solver, state, bf.Batch(jnp.zeros((2, 1)), jnp.zeros((1, 1))))
    np.testing.assert_allclose(found, -0.75)
    assert bool(info.finite.inner)


def hinge_machine(seed: int, num_flat: int):
    """A support vector machine: x = log of the two classes' costs, validation by logistic loss.

    The Hessian of G_j is I wherever it exists. The first `num_flat` samples are far on the right
    side of the margin, where the hinge is flat.
    """
    rng = np.random.default_rng(seed)
    n, m, features = 12, 6, 3
    truth = rng.normal(size=features)

    def draw(count):
        a = rng.normal(size=(count, features)) * 0.5
        return a, np.where(a @ truth > 0, 1.0, -1.0)

    a, y = draw(n)
    a[:num_flat] += 60.0 * y[:num_flat, None] * truth / np.linalg.norm(truth)
    b, u = draw(m)
    inner = {"a": jnp.asarray(a), "y": jnp.asarray(y)}
    outer = {"a": jnp.asarray(b), "y": jnp.asarray(u)}

    def inner_loss(z, x, batch):
        cost = jnp.exp(jnp.where(batch["y"] > 0, x[0], x[1]))
        hinge = jnp.maximum(0.0, 1.0 - batch["y"] * (batch["a"] @ z))
        return 0.5 * z @ z + cost * hinge

    def outer_loss(z, x, batch):
        return jax.nn.softplus(-batch["y"] * (batch["a"] @ z))

    def solution(x):
        """z*(x) = mean of cost·y·a over the samples within the margin, which are checked."""
        cost, active = np.exp(np.where(y > 0, x[0], x[1])), np.arange(n) >= num_flat
        z = (cost * active * y) @ a / n
        assert np.array_equal(y * (a @ z) < 1, active), "the minimiser lies elsewhere"
        return z

    def h(x):
        return np.mean(np.logaddexp(0.0, -u * (b @ solution(x))))

    eps = 1e-6
    gradient = lambda x: np.array(
        [(h(x + eps * e) - h(x - eps * e)) / (2 * eps) for e in np.eye(2)]
    )
    return bf.Problem(inner_loss, outer_loss), inner, outer, solution, gradient


def mean_direction(solver, inner, outer, z, x):
    """E[g] over all pairs of samples."""
    state = solver.init(jnp.asarray(z), jnp.asarray(x))
    pick = lambda tree, k: jax.tree.map(lambda leaf: leaf[k], tree)
    sizes = [len(jax.tree.leaves(side)[0]) for side in (inner, outer)]
    pairs = jnp.asarray(list(itertools.product(*map(range, sizes))))

    def one(pair):
        batch = bf.Batch(pick(inner, pair[0]), pick(outer, pair[1]))
        if solver.batches != (1, 1):
            batch = bf.Batch(tiled(batch.inner, solver.batches[0]), tiled(batch.outer, 1))
        return d_x_of(solver, state, batch)[0]

    return np.asarray(jax.jit(jax.vmap(one))(pairs).mean(0))


@pytest.mark.parametrize("seed", [0, 1])
def test_bsgo_is_unbiased_and_bsg_descends_on_a_support_vector_machine(seed, x64):
    steps = {"outer": optax.sgd(1.0), "adjoint_steps": 3}
    for x in (np.array([-1.0, -1.5]), np.array([-2.0, -0.7])):
        problem, inner, outer, solution, gradient = hinge_machine(seed, num_flat=2)
        # z is already the minimiser of the full G, so it is held.
        solver = contrib.bsgo(problem, inner=optax.sgd(0.0), inner_steps=1, **steps)
        found = mean_direction(solver, inner, outer, solution(x), x)
        np.testing.assert_allclose(found, gradient(x), rtol=1e-6, atol=1e-9)

        problem, inner, outer, solution, gradient = hinge_machine(seed, num_flat=0)
        solver = contrib.bsg(problem, inner=optax.sgd(1.0), inner_steps=2, **steps)
        found, true = mean_direction(solver, inner, outer, solution(x), x), gradient(x)
        assert found @ true >= 0.4 * true @ true


def test_bsg_runs_uphill_where_the_hessians_differ(x64):
    """The counterexample of bsg.py's docstring."""
    a, b = np.array([0.1, 10.0]), np.array([-1.0, 5.0])
    problem = bf.Problem(
        lambda z, x, batch: 0.5 * batch["a"] * z**2 - batch["b"] * x * z,
        lambda z, x, batch: z + 0.0 * batch["a"],
    )
    inner = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    outer = {"a": jnp.ones(1)}
    solver = contrib.bsgo(
        problem, inner=optax.sgd(0.0), outer=optax.sgd(1.0), inner_steps=1, adjoint_steps=1
    )
    z_star = b.mean() / a.mean()
    found = mean_direction(solver, inner, outer, z_star, 1.0)
    true = b.mean() / a.mean()
    np.testing.assert_allclose(found, (b / a).mean())
    assert found * true < 0


@pytest.mark.parametrize("count", [1, 4])
def test_the_randomised_series_has_the_mean_of_the_whole(count, x64):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(3, 3))
    hessian, grad = factor @ factor.T / 3 + np.eye(3), jnp.asarray(rng.normal(size=3))
    hvp = lambda u, sample: jnp.asarray(hessian) @ u
    samples = jnp.zeros(count - 1)
    values = [
        adjoints.randomised_neumann(0.2, count, jnp.int32(p))(hvp, grad, samples)[0]
        for p in range(count)
    ]
    whole, _ = adjoints.neumann(0.2)(hvp, grad, samples)
    np.testing.assert_allclose(np.mean(values, 0), whole, rtol=1e-12)
    powers = [np.linalg.matrix_power(np.eye(3) - 0.2 * hessian, k) for k in range(count)]
    np.testing.assert_allclose(whole, -0.2 * sum(powers) @ grad, rtol=1e-12)


def test_the_series_on_fresh_minibatches_is_unbiased(x64):
    rng = np.random.default_rng(1)
    hessians = jnp.asarray([np.diag(rng.uniform(0.5, 2.0, 2)) + 0.1 for _ in range(3)])
    grad = jnp.asarray(rng.normal(size=2))
    solve = jax.vmap(lambda ids: adjoints.neumann(0.3)(lambda u, i: hessians[i] @ u, grad, ids)[0])
    every = jnp.asarray(list(itertools.product(range(3), repeat=4)))
    full, _ = adjoints.neumann(0.3, times=4)(lambda u, _: hessians.mean(0) @ u, grad, None)
    np.testing.assert_allclose(solve(every).mean(0), full, rtol=1e-12)


def test_p_is_uniform_and_costs_what_it_draws(x64):
    data = transcriptions.smooth()
    problem, inner, outer = problem_of(data)
    solver = contrib.bsa(
        problem,
        inner=optax.sgd(0.1),
        outer=optax.sgd(0.01),
        inner_steps=2,
        adjoint_steps=3,
        adjoint_step=0.2,
    )
    run, rng = Run(solver, inner, outer), np.random.default_rng(0)
    state = solver.init(jnp.ones(SIZE), jnp.zeros(SIZE))
    units = []
    for _ in range(120):
        state, info = run.update(state, *run.draw(rng))
        units.append(float(info.oracle_units))
    counts = np.bincount(np.asarray(units, int), minlength=7)
    assert set(units) == {4.0, 5.0, 6.0}  # 2 inner steps, ∇F, the cross-JVP and p products
    assert counts[4:7].min() > 20, counts
    assert solver.units == 5.0


def test_vrbo_counts_its_passes_and_resumes_inside_one(x64):
    data = transcriptions.smooth()
    problem, inner, outer = problem_of(data)
    solver = contrib.vrbo(
        problem,
        inner=optax.sgd(0.1),
        outer=optax.sgd(0.1),
        adjoint_step=0.2,
        adjoint_steps=2,
        num_inner_batches=NUM_INNER,
        num_outer_batches=NUM_OUTER,
        period=3,
        inner_steps=1,
    )
    run = Run(solver, inner, outer)
    state = solver.init(jnp.ones(SIZE), jnp.zeros(SIZE))
    straight, units = run.full_pass(state)
    assert units == NUM_INNER * 4 + NUM_OUTER
    for _ in range(NUM_INNER + NUM_OUTER + 2):
        at = int(solver.refresh_cursor(state))
        ids = (np.int32(at), None) if at < NUM_INNER else (None, np.int32(at - NUM_INNER))
        state = run.refresh(state, *ids)
    assert int(solver.refresh_cursor(state)) == 2
    leaves, treedef = jax.tree.flatten(state)
    resumed, _ = run.full_pass(
        treedef.unflatten([jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, state.variables)
    assert int(solver.next_refresh(resumed)) == 3


def test_f2sa_tracks_the_adjoint_without_a_hessian(x64):
    data = quadratics(num_inner=1, num_outer=1, batch=4)
    errors = []
    for penalty in (1e2, 1e3):
        solver = bf.f2sa(
            data.problem,
            inner=optax.sgd(0.3),
            outer=optax.sgd(0.0),
            inner_steps=100,
            penalty=penalty,
        )
        one = data.batch(0, 0)
        batch = bf.Batch(*(tiled(side, k) for side, k in zip(one[:2], solver.batches, strict=True)))
        state = solver.init(data.inner_params, data.outer_params)
        state, info = jax.jit(solver.update)(state, batch)
        v_star = data.v_star(data.outer_params)
        errors.append(max(float(jnp.abs(state.adjoint[k] - v_star[k]).max()) for k in v_star))
        assert float(info.adjoint_residual) < 1e-6
    assert errors[1] < 0.2 * errors[0] < 0.1, errors


# One of each way in which D_x is put together; the others share amigo's.
@pytest.mark.parametrize("name", ["amigo", "vrbo", "f2sa", "unrolled"])
def test_rows_of_per_sample_weights_are_the_dense_gradient(name, x64):
    found = []
    for declared in (True, False):
        data = logistic(per_sample=declared)
        solver = METHODS[name](
            data.problem,
            inner=optax.sgd(0.2),
            outer=optax.adam(0.1),
            inner_weights=data.inner_weights,
            outer_weights=data.outer_weights,
        )
        run, rng = Run(solver, data.inner_batches, data.outer_batches), np.random.default_rng(0)
        state = solver.init(data.inner_params, data.outer_params)
        for _ in range(3):
            state, _ = run.full_pass(state, 4)
            i, j = run.draw(rng, (4, 3))
            state, info = run.update(state, i, j)
        assert all(bool(flag) for flag in info.finite)
        found.append(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        found[0].variables,
        found[1].variables,
    )


@pytest.mark.parametrize(
    ("name", "outer_updates"),
    [
        *((name, True) for name in ("amigo", "bsa", "mrbo", "vrbo", "f2sa", "unrolled")),
        ("bsa", False),
    ],
)
def test_the_model_state_moves_once_an_update(name, outer_updates):
    def inner_loss(z, x, batch, model_state, rng):
        noise = jax.random.normal(rng, z.shape)
        value = 0.5 * jnp.sum((z - x - batch - 0.1 * noise) ** 2)
        return value, bf.Aux({"seen": 2 * model_state["seen"] + 1}, {"noise": noise[0]})

    def outer_loss(z, x, batch, model_state, rng):
        return 0.5 * jnp.sum(z**2), bf.Aux({"seen": 10 * model_state["seen"]}, {})

    problem = bf.Problem(inner_loss, outer_loss, stateful=True, outer_updates_state=outer_updates)
    warned = pytest.warns(UserWarning, match="vrbo compares visits")
    with warned if name == "vrbo" else contextlib.nullcontext():
        solver = METHODS[name](problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(jnp.ones(2), jnp.ones(2), model_state={"seen": jnp.float32(1.0)})
    data = jnp.zeros((5, 2))
    run = Run(solver, data, data)
    before = state.model_state
    state, _ = run.full_pass(state, 4)
    jax.tree.map(np.testing.assert_array_equal, state.model_state, before)
    i, j = run.draw(np.random.default_rng(0), (4, 3))
    state, info = run.update(state, i, j)
    # One forward of G, then at most one of F, in the order in which the method visits them.
    expected = {False: 3.0, True: 21.0 if name == "bsa" else 30.0}[outer_updates]
    assert float(state.model_state["seen"]) == expected
    again, other = run.update(state, i, j)
    repeats = float(info.metrics["inner_noise"]) == float(other.metrics["inner_noise"])
    assert repeats == (name == "vrbo")  # it compares visits: a minibatch's key is that of its id
    same, _ = run.update(state, i, j)
    jax.tree.map(np.testing.assert_array_equal, same, again)


SGD = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1)}
PLAIN = bf.Problem(
    lambda z, x, batch: 0.5 * jnp.sum((z - x - batch) ** 2), lambda z, x, batch: jnp.sum(z * batch)
)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (bf.amigo, {"inner_steps": 0}, "inner_steps must be an integer >= 1, got 0"),
        (bf.amigo, {"adjoint_steps": 2.5}, "adjoint_steps must be an integer >= 1, got 2.5"),
        (bf.stocbio, {"adjoint_step": 0.0}, "adjoint_step must be a positive number"),
        (bf.stocbio, {"adjoint_step": 0.1, "adjoint_steps": -1}, "adjoint_steps must be .* >= 0"),
        (
            contrib.bsa,
            {"adjoint_step": 0.1, "adjoint_steps": 0},
            "adjoint_steps must be .* >= 1",
        ),
        (contrib.ttsa, {"adjoint_step": float("nan")}, "adjoint_step must be a positive number"),
        (contrib.mrbo, {"adjoint_step": 0.1, "eta": 1.5}, r"eta must lie in \[0, 1\]"),
        (contrib.sustain, {"adjoint_step": 0.1, "eta": -0.1}, r"eta must lie in \[0, 1\]"),
        (
            contrib.vrbo,
            COUNTS | {"adjoint_step": 0.1, "period": 0},
            "period must be an integer >= 1",
        ),
        (bf.f2sa, {"penalty": -1.0}, "penalty must be a positive number"),
        (bf.f2sa, {"inner_steps": True}, "inner_steps must be an integer >= 1, got True"),
        (bf.implicit, {"linear_solver": "lu"}, "linear_solver='lu' is unknown"),
        (bf.implicit, {"adjoint_step": 0.1}, "adjoint_step=0.1 has no use"),
        (bf.implicit, {"linear_solver": "neumann"}, "adjoint_step must be a positive number"),
        (bf.implicit, {"damping": -1.0}, "damping must be a finite number >= 0"),
        (contrib.bsg, {"inner_steps": 0}, "inner_steps must be an integer >= 1"),
        (contrib.bsgo, {"adjoint_steps": 0}, "adjoint_steps must be an integer >= 1"),
        (bf.unrolled, {"inner_steps": 0}, "inner_steps must be an integer >= 1"),
        (bf.amigo, {"inner_weights": [0.5, 0.6]}, "inner_weights must sum to 1"),
        (
            contrib.vrbo,
            COUNTS | {"adjoint_step": 0.1, "period": 1, "inner_weights": [0.5, 0.5]},
            "inner_weights has shape",
        ),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(PLAIN, **(SGD | arguments))


def test_a_wrong_leading_axis_is_named():
    solver = bf.amigo(PLAIN, **SGD, inner_steps=2, adjoint_steps=1)
    state = solver.init(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"batch.inner has shape \(2,\).*leading axis of 4"):
        solver.update(state, bf.Batch(jnp.ones(2), jnp.ones((1, 2))))
    with pytest.raises(ValueError, match=r"batch.outer_id has shape \(2,\).*leading axis of 1"):
        ids = jnp.zeros(4, jnp.int32), jnp.zeros(2, jnp.int32)
        solver.update(state, bf.Batch(jnp.ones((4, 2)), jnp.ones((1, 2)), *ids))


def test_one_outer_minibatch_may_come_without_its_axis():
    solver = bf.amigo(PLAIN, **SGD, inner_steps=2, adjoint_steps=1)
    state = solver.init(jnp.ones(2), jnp.ones(2))
    inner, ids, update = jnp.ones((4, 2)), jnp.zeros(4, jnp.int32), jax.jit(solver.update)
    one, _ = update(state, bf.Batch(inner, jnp.ones(2), ids, jnp.int32(0)))
    other, _ = update(state, bf.Batch(inner, jnp.ones((1, 2)), ids, jnp.zeros(1, jnp.int32)))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_weights_without_ids_are_refused():
    solver = bf.stocbio(PLAIN, **SGD, adjoint_step=0.1, inner_weights=[0.5, 0.5])
    state = solver.init(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="batch.inner_id is None, but stocbio needs"):
        solver.update(state, bf.Batch(jnp.ones((21, 2)), jnp.ones((1, 2))))


@pytest.mark.parametrize("make", [METHODS["amigo"], METHODS["ttsa"]], ids=["amigo", "ttsa"])
def test_a_row_sparse_outer_optimiser_gets_rows(make, x64):
    data, found = logistic(), []
    for outer in (optax.sgd(0.5), bf.outer.lazy_sgd(0.5)):
        solver = make(data.problem, inner=optax.sgd(0.2), outer=outer)
        run, rng = Run(solver, data.inner_batches, data.outer_batches), np.random.default_rng(0)
        state = solver.init(data.inner_params, data.outer_params)
        for _ in range(3):
            state, _ = run.update(state, *run.draw(rng, (4, 3)))
        found.append(state.variables)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(close, *found)


def test_a_row_sparse_outer_optimiser_is_refused_where_the_direction_is_dense():
    with pytest.raises(
        ValueError, match="row-sparse optimiser, but mrbo's direction of x is dense"
    ):
        METHODS["mrbo"](logistic().problem, inner=optax.sgd(0.1), outer=bf.outer.lazy_sgd(0.1))
    # Without per-sample leaves there is nothing sparse about it.
    METHODS["mrbo"](PLAIN, inner=optax.sgd(0.1), outer=bf.outer.lazy_sgd(0.1))


def test_x_reaches_the_inner_and_adjoint_optimisers():
    seen = []

    def update(grads, state, params=None, **extra):
        seen.append(sorted(extra))
        return jax.tree.map(lambda g: -0.1 * g, grads), state

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    solver = bf.amigo(PLAIN, inner=spy, outer=optax.sgd(0.1), inner_steps=1, adjoint_steps=1)
    state = solver.init(jnp.ones(2), jnp.ones(2))
    jax.eval_shape(solver.update, state, bf.Batch(jnp.ones((3, 2)), jnp.ones((1, 2))))
    about_v = {"adjoint_residual", "grad", "inner_opt_state", "inner_params", "value"}
    assert {"outer_params", "value", "grad", "value_fn", "grad_fn"} in map(set, seen)
    assert about_v | {"outer_params"} in map(set, seen)
