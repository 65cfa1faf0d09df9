"""Inner problems given by a condition: v's system has Jᵀ in it, and J is not symmetric."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import contrib, sharding
from bilevel_flax.diagnostics import check_symmetry, hypergradient_check
from bilevel_flax.sharding.decomposition import decomposition

SIZE, ROWS = 4, 8
RNG = np.random.default_rng(0)
MATRIX = np.eye(SIZE) + 0.4 * RNG.normal(size=(SIZE, SIZE))
DRIVE = RNG.normal(size=(SIZE, 3))
NOISE = 0.3 * RNG.normal(size=(ROWS, SIZE))
STILL = optax.set_to_zero()
X = {"drive": np.array([0.3, -0.2, 0.5]), "rows": np.linspace(-1, 1, ROWS)}


def flat(z):
    return jnp.concatenate([z["a"], z["b"].reshape(-1)])


def tree(vector):
    return {"a": vector[:1], "b": vector[1:].reshape(3, 1)}


def condition(z, x, batch):
    """tanh(A z) + z/2 - B x - mean of the examples' noise, each with a weight of its own."""
    z = flat(z)
    matrix, drive = jnp.asarray(MATRIX, z.dtype), jnp.asarray(DRIVE, z.dtype)
    shift = jnp.mean(jax.nn.sigmoid(x["rows"])[:, None] * batch["noise"], 0)
    return tree(jnp.tanh(matrix @ z) + 0.5 * z - drive @ x["drive"] - shift)


def outer_loss(z, x, batch):
    fit = 0.5 * jnp.mean((flat(z)[None] - batch) ** 2)
    return fit + 0.1 * jnp.sum(x["drive"] ** 2) * z["a"][0]


PROBLEM = bf.Problem.from_condition(
    condition, outer_loss, per_sample={"drive": False, "rows": True}
)


def minibatches(count: int):
    """The inner data in so many minibatches, [count, ROWS / count, ...], and the outer one."""
    inner = {"noise": jnp.asarray(NOISE), "index": jnp.arange(ROWS, dtype=jnp.int32)}
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), inner), jnp.ones(
        (8, 4)
    )


def start(dtype=None):
    as_dtype = lambda a: jnp.asarray(a, dtype or jnp.result_type(float))
    return tree(as_dtype(np.zeros(SIZE))), jax.tree.map(as_dtype, X)


def derivatives(z, x):
    """(c, ∂c/∂z, ∂c/∂drive, ∂c/∂rows) on all the data, in NumPy."""
    share = 1 / (1 + np.exp(-x["rows"]))
    value = np.tanh(MATRIX @ z) + 0.5 * z - DRIVE @ x["drive"] - (share[:, None] * NOISE).mean(0)
    jacobian = (1 - np.tanh(MATRIX @ z) ** 2)[:, None] * MATRIX + 0.5 * np.eye(SIZE)
    return value, jacobian, -DRIVE, -(share * (1 - share))[None] * NOISE.T / ROWS


def outer_gradients(z, x):
    """(∇₁F, ∇₂F by drive)."""
    squares = np.sum(x["drive"] ** 2)
    return (z - 1) / SIZE + 0.1 * squares * np.eye(SIZE)[0], 0.2 * x["drive"] * z[0]


def direction(z, v, x):
    """D_x."""
    _, _, by_drive, by_rows = derivatives(z, x)
    return {"drive": by_drive.T @ v + outer_gradients(z, x)[1], "rows": by_rows.T @ v}


@functools.cache
def solution():
    """(z*, v*, ∇h): Newton's method and a linear solve."""
    z = np.zeros(SIZE)
    for _ in range(30):
        value, jacobian, *_ = derivatives(z, X)
        z = z - np.linalg.solve(jacobian, value)
    assert np.linalg.norm(jacobian - jacobian.T) > 0.3 * np.linalg.norm(jacobian)
    v = -np.linalg.solve(jacobian.T, outer_gradients(z, X)[0])
    return z, v, direction(z, v, X)


def compiled(function):
    # The compiler's time is most of this file's; what is tested does not depend on its effort.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def repeated(solver, state, batch, times: int):
    step = lambda state, _: solver.update(state, batch)
    return compiled(lambda state: jax.lax.scan(step, state, None, times)[0])(state)


def close(found, wanted, tolerance=1e-8):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), found, wanted)


def lowered(problem):
    return bf.oracles.mixed_precision(problem, "float32")


def stateful(problem):
    """The same with a model state that counts."""

    def with_state(function):
        def call(z, x, batch, state, rng):
            assert rng is not None
            return function(z, x, batch), bf.Aux(state + 1, {"steps": state})

        return call

    return bf.Problem.from_condition(
        with_state(condition),
        with_state(outer_loss),
        stateful=True,
        per_sample=problem.per_sample,
    )


WRAPPED = {
    "as it is": (lambda problem: problem, 1e-10),
    "in parts, recomputed": (
        lambda problem: bf.oracles.remat(bf.oracles.microbatched(problem, 4)),
        1e-10,
    ),
    "in float32": (lowered, 1e-5),
    "with a state": (stateful, 1e-10),
    "with shares of the samples": (lambda problem: problem, 1e-10),
    "on eight devices": (
        lambda problem: sharding.data_parallel(problem, sharding.make_mesh("data=8")),
        1e-10,
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_directions_are_those_of_the_transposed_jacobian(name, x64):
    wrap, tolerance = WRAPPED[name]
    problem = wrap(PROBLEM)
    inner, outer = minibatches(1)
    batch = bf.Batch(jax.tree.map(lambda leaf: leaf[0], inner), outer)
    z, v = RNG.normal(size=(2, SIZE))
    weighted = name == "with shares of the samples"
    weights = jnp.array([0.25, 0.75]) if weighted else None
    solver = bf.soba(problem, inner=optax.sgd(1.0), outer=optax.sgd(1.0), inner_weights=weights)
    batch = batch._replace(inner_id=jnp.int32(1)) if weighted else batch
    model_state = jnp.int32(3) if problem.stateful else None
    state = solver.init(tree(jnp.asarray(z)), start()[1], model_state=model_state)
    state = state.replace(adjoint=tree(jnp.asarray(v)))
    new, info = compiled(solver.update)(state, batch)
    value, jacobian, *_ = derivatives(z, X)
    grad_z = outer_gradients(z, X)[0]
    factor = 1.5 if weighted else 1.0
    close(z - flat(new.inner_params), factor * value, tolerance)
    close(v - flat(new.adjoint), factor * jacobian.T @ v + grad_z, tolerance)
    step = {name: X[name] - new.outer_params[name] for name in X}
    wanted = direction(z, factor * v, X)
    close(step, wanted, tolerance)
    if name in ("as it is", "with a state"):
        np.testing.assert_allclose(info.inner_loss, np.linalg.norm(value), rtol=1e-10)
    if problem.stateful:
        assert int(new.model_state) == 4 and int(info.metrics["inner_steps"]) == 3


COUNTS = {"num_inner_batches": 2, "num_outer_batches": 1}
SINGLE = {
    "soba": (bf.soba, 1),
    "saba": (functools.partial(bf.saba, **COUNTS), 2),
    "srba": (functools.partial(bf.srba, **COUNTS, period=4), 2),
    "storm": (functools.partial(bf.storm, eta=0.5), 1),
    "masoba": (functools.partial(contrib.masoba, theta=0.5), 1),
    "auto": (functools.partial(bf.auto, steps=10**9, damping=0.0), 1),
}


@pytest.mark.parametrize("name", SINGLE)
def test_the_tracked_adjoint_ends_at_the_hypergradient(name, x64):
    """With x held still, on one minibatch, or on two of them where a method has a memory."""
    make, count = SINGLE[name]
    solver = make(PROBLEM, inner=optax.sgd(0.3), outer=STILL)
    inner, outer = minibatches(count)
    pick = lambda i: jax.tree.map(lambda leaf: leaf[i], inner)
    state = solver.init(*start())

    def step(state, i):
        state = solver.update(state, bf.Batch(pick(i % count), outer, i % count, jnp.int32(0)))[0]
        return state, None

    if name == "srba":
        refresh = compiled(solver.refresh)
        for i in range(count):
            state = refresh(state, bf.Batch(pick(i), None, jnp.int32(i), None))
        state = refresh(state, bf.Batch(None, outer, None, jnp.int32(0)))
    run = compiled(lambda state: jax.lax.scan(step, state, jnp.arange(400, dtype=jnp.int32)))
    state, _ = run(state)
    close((flat(state.inner_params), flat(state.adjoint)), solution()[:2])


def nested_step(solver, x):
    """The hypergradient that a nested method steps along, from z near z*."""
    count, _ = solver.batches
    inner, outer = minibatches(1)
    state = solver.init(tree(jnp.asarray(solution()[0] + 1e-3)), x)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, 0), inner)
    if count == 1:
        repeated, outer = jax.tree.map(lambda leaf: leaf[0], repeated), outer
    batch = bf.Batch(repeated, outer if count == 1 else outer[None])
    new, info = compiled(solver.update)(state, batch)
    return jax.tree.map(jnp.subtract, state.outer_params, new.outer_params), info


SGD = {"inner": optax.sgd(0.3), "outer": optax.sgd(1.0)}
NESTED = {
    "implicit": functools.partial(bf.implicit, inner_steps=200, adjoint_steps=SIZE),
    "implicit, neumann": functools.partial(
        bf.implicit, inner_steps=200, adjoint_steps=200, linear_solver="neumann", adjoint_step=0.3
    ),
    "amigo": functools.partial(bf.amigo, inner_steps=200, adjoint_steps=200),
    "bsg": functools.partial(contrib.bsg, inner_steps=200, adjoint_steps=SIZE),
}


@pytest.mark.parametrize("name", NESTED)
def test_the_nested_methods_solve_the_system_that_is_not_symmetric(name, x64):
    step, info = nested_step(NESTED[name](PROBLEM, **SGD), start()[1])
    close(step, solution()[2])
    assert info.adjoint_residual < 1e-8
    assert info.metrics.get("adjoint_unsolved", 0.0) == 0.0


def test_parameters_that_are_held_have_no_condition(x64):
    problem = bf.oracles.trainable(PROBLEM, {"a": False, "b": True})
    inner, outer = minibatches(1)
    batch = bf.Batch(jax.tree.map(lambda leaf: leaf[0], inner), outer)
    point = bf.Variables(*(tree(jnp.ones(SIZE)),) * 2, start()[1])
    oracles = jax.jit(lambda: bf.oracles.evaluate(problem, point, batch))()
    _, jacobian, *_ = derivatives(np.ones(SIZE), X)
    assert oracles.inner_grad["a"] == oracles.hvp["a"] == 0
    np.testing.assert_allclose(flat(oracles.hvp)[1:], jacobian[1:, 1:].T @ np.ones(3), rtol=1e-10)


def test_unrolled_differentiates_the_iteration(x64):
    problem = bf.Problem.from_condition(
        lambda z, x, batch: condition(z, x, {"noise": jnp.asarray(NOISE)}), outer_loss
    )
    step, _ = nested_step(bf.unrolled(problem, inner_steps=200, **SGD), start()[1])
    close(step, solution()[2])


def test_gmres_says_where_its_products_did_not_suffice(x64):
    def turning(z, x, batch):  # a cyclic shift: no Krylov space but the whole one helps
        return jnp.roll(z, 1) - x - batch

    problem = bf.Problem.from_condition(turning, lambda z, x, batch: z[0])
    unsolved = []
    for steps in (5, 6):
        solver = bf.implicit(problem, inner_steps=1, adjoint_steps=steps, **SGD)
        state = solver.init(jnp.zeros(6), jnp.zeros(6))
        batch = bf.Batch(jnp.zeros((2, 6)), jnp.zeros((1, 6)))
        info = compiled(solver.update)(state, batch)[1]
        unsolved.append((float(info.metrics["adjoint_unsolved"]), info.adjoint_residual < 1e-9))
    assert unsolved == [(1.0, False), (0.0, True)]


def test_a_temporal_difference_has_its_own_hypergradient(x64):
    """z* = 1 / (1 - γ) with γ = σ(x); as a loss with stop_gradient it gives 1.03."""
    gamma = jax.nn.sigmoid
    problem = bf.Problem.from_condition(
        lambda z, x, batch: z - (1 + gamma(x) * z), lambda z, x, batch: 0.5 * (z - 1) ** 2
    )
    solver = bf.soba(problem, inner=optax.sgd(0.3), outer=STILL)
    state = solver.init(jnp.array(0.0), jnp.array(0.5))
    batch = bf.Batch(0.0, 0.0)
    state = repeated(solver, state, batch, 400)
    right = jax.grad(lambda x: 0.5 * (1 / (1 - gamma(x)) - 1) ** 2)(0.5)
    check = hypergradient_check(problem, state, batch)
    assert check.symmetry.ok
    np.testing.assert_allclose([check.direction, check.reference], right, rtol=1e-10)
    np.testing.assert_allclose(right, 2.71828, rtol=1e-5)


def test_a_game_of_two_players_is_a_condition(x64):
    """min over a, max over b of a payoff that is curved by x: the second gradient's sign turns."""

    def payoff(a, b, x):
        return 0.5 * x * a**2 + 2.0 * a * b - 0.5 * b**2 + a + jnp.sin(x) * b

    def condition(z, x, batch):
        by_a, by_b = jax.grad(payoff, (0, 1))(z["a"], z["b"], x)
        return {"a": by_a, "b": -by_b}

    loss = lambda z, x, batch: (z["a"] - z["b"]) ** 2
    problem = bf.Problem.from_condition(condition, loss)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=STILL)
    state = solver.init({"a": jnp.array(0.0), "b": jnp.array(0.0)}, jnp.array(0.7))
    batch = bf.Batch(0.0, 0.0)
    state = repeated(solver, state, batch, 1000)

    def value(x):  # x a + 2 b + 1 = 0, -2 a + b - sin x = 0
        a = -(1 + 2 * jnp.sin(x)) / (x + 4)
        return loss({"a": a, "b": 2 * a + jnp.sin(x)}, x, None)

    info = compiled(solver.update)(state, batch)[1]
    np.testing.assert_allclose(info.norms.outer, abs(jax.grad(value)(0.7)), rtol=1e-9)


@pytest.mark.parametrize("method", ["dense", "gmres"])
def test_the_hypergradient_check_transposes(method, x64):
    z, v, gradient = solution()
    inner, outer = minibatches(1)
    point = bf.Variables(tree(jnp.asarray(z)), tree(jnp.asarray(v + 0.1)), start()[1])
    check = hypergradient_check(
        PROBLEM, point, jax.tree.map(lambda leaf: leaf[0], inner), outer, method=method
    )
    close(check.reference, gradient)
    assert check.converged and check.method == method and not check.negative_curvature
    assert check.adjoint_residual > 0.1
    if method == "dense":
        real = np.linalg.eigvals(derivatives(z, X)[1]).real
        np.testing.assert_allclose(check.smallest_curvature, real.min(), rtol=1e-9)


def test_a_stopped_gradient_in_a_condition_is_named_and_an_asymmetric_one_is_right():
    stop = jax.lax.stop_gradient
    loss = lambda z, x, batch: jnp.sum(z)
    turned = lambda z, x, batch: z + x * jnp.roll(z, 1)
    stopped = lambda z, x, batch: z + x * stop(jnp.roll(z, 1))
    point = bf.Variables(jnp.ones(3), jnp.ones(3), jnp.array(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_symmetry(bf.Problem.from_condition(turned, loss), point, None).ok
    with pytest.warns(UserWarning, match="stop_gradient"):
        assert not check_symmetry(bf.Problem.from_condition(stopped, loss), point, None).ok


def test_the_warning_about_a_loss_points_to_the_condition():
    stop = jax.lax.stop_gradient
    problem = bf.Problem(
        lambda z, x, batch: 0.5 * (1 + jax.nn.sigmoid(x) * stop(z) - z) ** 2,
        lambda z, x, batch: 0.5 * (z - 1) ** 2,
    )
    one = jnp.array(1.0)
    with pytest.warns(UserWarning, match=r"bf\.Problem\.from_condition"):
        check_symmetry(problem, bf.Variables(one, one, one), 0.0)


def test_a_mesh_is_told_whether_the_condition_is_a_mean(x64):
    mesh = sharding.make_mesh("data=8")
    z, x = tree(jnp.ones(SIZE)), start()[1]
    batch = bf.Batch({"noise": jnp.asarray(NOISE), "index": jnp.arange(ROWS)}, jnp.ones((8, 4)))
    mean = lambda z, x, batch: jax.tree.map(lambda leaf: leaf * batch["noise"].mean(), z)
    wrong = lambda z, x, batch: jax.tree.map(lambda leaf: leaf * batch["noise"].std(), z)
    loss = lambda z, x, batch: z["a"][0] * batch.mean()
    for function, reason in ((mean, ""), (wrong, "inner_loss of a minibatch is")):
        problem = bf.Problem.from_condition(function, loss)
        found = decomposition(problem, mesh, z, x, batch)
        assert found.startswith(reason) and bool(found) == bool(reason)


def updated(make, condition=condition):
    z, x = start()
    problem = bf.Problem.from_condition(condition, outer_loss, per_sample=PROBLEM.per_sample)
    solver = make(problem)
    inner, outer = minibatches(1)
    batch = bf.Batch(jax.tree.map(lambda leaf: leaf[0], inner), outer)
    if solver.batches != (1, 1):
        batch = bf.Batch(jax.tree.map(lambda leaf: jnp.repeat(leaf, 11, 0), inner), outer[None])
    return solver.update(solver.init(z, x), batch)


def soba(problem):
    return bf.soba(problem, inner=optax.sgd(0.1), outer=STILL)


def searching(problem):
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(4))
    return bf.soba(problem, inner=search, adjoint=optax.sgd(0.1), outer=STILL)


CG = functools.partial(bf.implicit, linear_solver="cg", **SGD)
F2SA = functools.partial(bf.f2sa, **SGD)
MISTAKES = {
    "another shape": (
        lambda: updated(soba, lambda z, x, batch: {**z, "b": z["b"][:2]}),
        r"condition\['b'\] is float32\[2, 1\], but inner_params\['b'\] is float32\[3, 1\]",
    ),
    "another dtype": (
        lambda: updated(soba, lambda z, x, batch: {**z, "a": z["a"].astype(jnp.bfloat16)}),
        r"condition\['a'\] is bfloat16\[1\]",
    ),
    "another tree": (
        lambda: updated(soba, lambda z, x, batch: z["a"] * x["drive"][0]),
        "condition returned the tree .*, but inner_params is",
    ),
    "two arguments": (
        lambda: updated(soba, lambda z, x: z),
        r"condition\(z, x\) is called as condition\(inner_params, outer_params, batch\)",
    ),
    "an unused x": (
        lambda: updated(soba, lambda z, x, batch: jax.tree.map(lambda a: a * x["drive"][0], z)),
        r"outer_params\['rows'\]",
    ),
    "no function": (lambda: bf.Problem.from_condition(None, outer_loss), "must be a function"),
    "forward mode": (
        lambda: dataclasses.replace(PROBLEM, derivatives="forward_over_reverse"),
        "leave derivatives out",
    ),
    "a sum and its weight": (
        lambda: bf.oracles.weighted_sums(PROBLEM),
        "the inner problem is a condition",
    ),
    "conjugate gradients": (lambda: CG(PROBLEM), 'linear_solver="cg" needs a symmetric'),
    "f2sa": (lambda: F2SA(PROBLEM), "f2sa needs the value of inner_loss"),
    "a gradient of the value": (
        lambda: bf.oracles.inner_grad_outer(PROBLEM, *start(), None),
        "a condition has no value",
    ),
    "a line search": (lambda: updated(searching), "line search.* needs the value of inner_loss"),
    "minres": (
        lambda: hypergradient_check(
            PROBLEM, bf.Variables(*(start()[0],) * 2, start()[1]), None, None, method="minres"
        ),
        'method="minres" needs a symmetric',
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_right_is_refused_in_one_line(name):
    call, message = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
