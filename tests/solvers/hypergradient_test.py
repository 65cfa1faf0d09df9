"""The reference of the hypergradient check against closed forms and finite differences of h."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnostics_test import flat
from jax.flatten_util import ravel_pytree
from problems import finite_sums, logistic, quadratics

import bilevel_flax as bf
from bilevel_flax import data, diagnostics

pytestmark = pytest.mark.usefixtures("x64")
check = diagnostics.hypergradient_check


def whole(source: Any) -> bf.Batch:
    """All data as one batch, padding and mask included."""
    merged = [
        {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in side.items()}
        for side in (source.inner_batches, source.outer_batches)
    ]
    return bf.Batch(*merged)


@pytest.fixture(scope="module")
def source() -> Any:
    jax.config.update("jax_enable_x64", True)
    made = quadratics(ragged=True)
    jax.config.update("jax_enable_x64", False)
    return made


def exact_point(source: Any) -> bf.Variables:
    x = source.outer_params
    return bf.Variables(source.z_star(x), source.v_star(x), x)


@pytest.mark.parametrize("method", ["dense", "minres"])
def test_it_is_the_gradient_of_h_on_quadratics(source: Any, method: str):
    found = check(
        source.problem, exact_point(source), *finite_sums(source), method=method, tolerance=1e-12
    )
    np.testing.assert_allclose(flat(found.reference), flat(source.grad_h(source.outer_params)))
    assert found.method == method
    assert found.converged
    assert not found.negative_curvature
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert found.norm_ratio == pytest.approx(1)
    assert found.relative_error < 1e-10
    assert found.adjoint_residual < 1e-10
    curvature = np.linalg.eigvalsh(source.means["A"])
    seen = (found.smallest_curvature, found.largest_curvature)
    np.testing.assert_allclose(seen, curvature[[0, -1]], rtol=1e-8)


@pytest.mark.parametrize("method", ["dense", "minres"])
def test_it_measures_how_far_the_tracked_adjoint_is_off(source: Any, method: str):
    exact = exact_point(source)
    off = exact._replace(adjoint=jax.tree.map(lambda v: 0.5 * v, exact.adjoint))
    found = check(source.problem, off, *finite_sums(source), method=method, tolerance=1e-12)
    ours, truth = flat(source.full_directions(off).outer), flat(source.grad_h(off.outer))
    size = np.linalg.norm(truth)
    assert found.relative_error == pytest.approx(np.linalg.norm(ours - truth) / size)
    assert found.norm_ratio == pytest.approx(np.linalg.norm(ours) / size)
    assert found.cosine == pytest.approx(ours @ truth / np.linalg.norm(ours) / size)
    assert found.adjoint_residual == pytest.approx(0.5)
    np.testing.assert_allclose(flat(found.direction), ours)


def test_a_state_a_batch_and_lists_of_minibatches_say_the_same(source: Any):
    solver = bf.soba(source.problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    point = source.random_variables()
    state = solver.init(point.inner, point.outer).replace(adjoint=point.adjoint)
    lists = [
        [{name: leaf[i] for name, leaf in side.items()} for i in range(len(side["mask"]))]
        for side in (source.inner_batches, source.outer_batches)
    ]
    found = [
        check(source.problem, state, *finite_sums(source)),
        check(source.problem, point, *lists),
        check(source.problem, point, whole(source)),
    ]
    assert 0 < abs(found[0].cosine) < 0.999
    for other in found[1:]:
        assert other.cosine == pytest.approx(found[0].cosine)
        assert other.adjoint_residual == pytest.approx(found[0].adjoint_residual)


@pytest.mark.parametrize("per_sample", [True, False])
def test_it_is_the_gradient_of_h_by_finite_differences_also_for_rows(per_sample: bool):
    source = logistic(per_sample=per_sample)
    sums = finite_sums(source)
    batch = whole(source)
    x, to_x = ravel_pytree(source.outer_params)
    start, to_z = ravel_pytree(source.inner_params)

    def dense_loss(z, x):
        # The definition of rows, written out, so that JAX differentiates it.
        if per_sample:
            x = {**x, "logits": x["logits"][batch.inner["index"]]}
        return source.problem.inner_loss(z, x, batch.inner)

    gradient = jax.grad(lambda z, x: dense_loss(to_z(z), to_x(x)))
    hessian = jax.hessian(lambda z, x: dense_loss(to_z(z), to_x(x)))

    @jax.jit
    def best_and_value(x):
        def newton(_, z):
            return z - jnp.linalg.solve(hessian(z, x), gradient(z, x))

        z = jax.lax.fori_loop(0, 12, newton, start)
        return z, source.problem.outer_loss(to_z(z), to_x(x), batch.outer)

    eps = 1e-5
    moves = eps * np.eye(len(x))
    h = lambda x: float(best_and_value(x)[1])
    truth = [(h(x + move) - h(x - move)) / (2 * eps) for move in moves]
    z = to_z(best_and_value(x)[0])
    point = bf.Variables(z, jax.tree.map(jnp.zeros_like, z), to_x(x))
    for method in ("dense", "minres"):
        found = check(source.problem, point, *sums, method=method, tolerance=1e-12)
        np.testing.assert_allclose(flat(found.reference), truth, rtol=1e-6, atol=1e-10)
        assert found.adjoint_residual == pytest.approx(1)


def bent(curvature: np.ndarray) -> bf.Problem:
    """G = ½zᵀ diag(curvature) z + zᵀx, F = sum(z)."""
    diagonal = jnp.asarray(curvature)
    return bf.Problem(
        inner_loss=lambda z, x, batch: 0.5 * (diagonal * z) @ z + x @ z + 0.0 * batch.sum(),
        outer_loss=lambda z, x, batch: z.sum() + 0.0 * (x @ x) + 0.0 * batch.sum(),
    )


@pytest.mark.parametrize("method", ["dense", "minres"])
def test_negative_curvature_is_found_and_the_system_is_solved_all_the_same(method: str):
    curvature = np.array([-2.0, 0.5, 1.0, 3.0])
    point = bf.Variables(jnp.ones(4), jnp.ones(4), jnp.ones(4))
    one = jnp.ones(1)
    found = check(bent(curvature), point, one, one, method=method, tolerance=1e-10)
    assert found.negative_curvature
    assert found.smallest_curvature == pytest.approx(-2)
    assert found.largest_curvature == pytest.approx(3)
    assert found.converged
    # D_x = v: the implicit formula at a saddle, which is what D_x would converge to if it could.
    np.testing.assert_allclose(found.reference, -1 / curvature, rtol=1e-8)


@pytest.mark.parametrize("method", ["dense", "minres"])
def test_a_system_without_a_solution_is_not_called_solved(method: str):
    point = bf.Variables(jnp.ones(3), jnp.ones(3), jnp.ones(3))
    one = jnp.ones(1)
    found = check(bent(np.array([0.0, 1.0, 2.0])), point, one, one, method=method)
    assert not found.converged
    # Of the three equations one says 0 = -1: what is left of the residual is 1 / √3.
    assert found.reference_residual == pytest.approx(1 / np.sqrt(3))
    # D_x = v: the shortest least-squares solution.
    np.testing.assert_allclose(found.reference, [0, -1, -0.5], atol=1e-6)


def test_too_few_iterations_are_owned_up_to(source: Any):
    found = check(
        source.problem,
        exact_point(source),
        *finite_sums(source),
        method="minres",
        max_iterations=2,
    )
    assert not found.converged
    assert found.iterations == 2
    assert found.reference_residual > 1e-3
    assert found.relative_error > 1e-4


def test_damping_enters_the_reference_only(source: Any):
    exact = exact_point(source)
    curvature = source.means["A"]
    shape = ravel_pytree(exact.adjoint)[1]
    amounts = np.linspace(0.1, 0.7, len(curvature))
    for damping, diagonal in ((0.5, 0.5 * np.ones_like(amounts)), (shape(amounts), amounts)):
        v = np.linalg.solve(curvature + np.diag(diagonal), curvature @ flat(exact.adjoint))
        expected = source.full_directions(exact._replace(adjoint=shape(jnp.asarray(v)))).outer
        for method in ("dense", "minres"):
            found = check(
                source.problem,
                exact,
                *finite_sums(source),
                damping=damping,
                method=method,
                tolerance=1e-12,
            )
            np.testing.assert_allclose(flat(found.reference), flat(expected), rtol=1e-8)
            assert found.adjoint_residual < 1e-10
            assert found.converged


def test_the_damping_of_decay_outside_the_loss_is_read_from_the_state():
    rng = np.random.default_rng(0)
    z, nu = rng.normal(size=3), rng.uniform(0.1, 2, size=3)
    inner = optax.adamw(0.1, b2=1 - 1e-12, weight_decay=0.3)
    state = inner.init(jnp.asarray(z))
    late = jnp.iinfo(jnp.int32).max  # no bias correction, and ν moves no more

    def at(gradient):
        adam = state[0]._replace(count=late, mu=gradient, nu=jnp.asarray(nu))
        return (adam, *state[1:])

    damping = diagnostics.decoupled_decay(at(jnp.zeros(3)), 0.3)
    # Where P∇G + λz = 0, that is ∇G = -λP⁻¹z, AdamW stands still: z solves the damped system.
    gradient = -damping * z
    step, _ = optax.adamw(0.1, b2=0.9999999, weight_decay=0.3).update(
        gradient, at(gradient), jnp.asarray(z)
    )
    np.testing.assert_allclose(step, 0, atol=1e-7)
    np.testing.assert_allclose(damping, 0.3 * np.sqrt(nu), rtol=1e-6)
    with pytest.raises(ValueError, match="0 Adam states"):
        diagnostics.decoupled_decay(optax.sgd(0.1).init(jnp.ones(2)), 0.1)


class Net(nn.Module):
    """BatchNorm and dropout."""

    @nn.compact
    def __call__(self, inputs, train: bool):
        out = nn.BatchNorm(use_running_average=not train, param_dtype=float, dtype=float)(inputs)
        out = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(out))
        return nn.Dense(1, param_dtype=float)(out)[:, 0]


def stateful() -> tuple[bf.Problem, bf.TrainState, list[dict], list[dict]]:
    net = Net()
    rng = np.random.default_rng(0)

    def inner_loss(z, x, batch, model_state, rng):
        variables = {"params": z, **model_state}
        out, new = net.apply(
            variables, batch["inputs"], True, mutable=["batch_stats"], rngs={"dropout": rng}
        )
        losses = jax.nn.sigmoid(x) * (out - batch["target"]) ** 2
        return losses.mean() + 0.3 * optax.tree.norm(z, squared=True), bf.Aux(dict(new))

    def outer_loss(z, x, batch, model_state, rng):
        out = net.apply({"params": z, **model_state}, batch["inputs"], False)
        return ((out - batch["target"]) ** 2).mean(), bf.Aux()

    def draw(i):
        return {
            "inputs": rng.normal(size=(6, 3)),
            "target": rng.normal(size=6),
            "index": np.arange(6 * i, 6 * i + 6, dtype=np.int32),
        }

    problem = bf.Problem(inner_loss, outer_loss, stateful=True, per_sample=True)
    variables = dict(net.init(jax.random.key(0), np.zeros((1, 3)), False))
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(
        variables.pop("params"),
        jnp.zeros(12),
        model_state=variables,
        rng=jax.random.PRNGKey(3),
    )
    state = state.replace(adjoint=jax.tree.map(lambda z: 0.1 + z, state.inner_params))
    return problem, state, [draw(0), draw(1)], [draw(2)]


def test_batch_norm_and_dropout_are_as_in_training_and_always_the_same():
    problem, state, inner, outer = stateful()
    found = check(problem, state, inner, outer)
    assert check(problem, state, inner, outer).cosine == found.cosine
    other = check(problem, state, inner, outer, rng=jax.random.PRNGKey(4))
    assert other.cosine != found.cosine  # other units are dropped
    # Written out: the mean Hessian, the keys as documented, the rows of both minibatches.
    z, to_z = ravel_pytree(state.inner_params)

    def total(z, x):
        rng = state.rng
        values = [
            problem.inner_loss(
                to_z(z), x[b["index"]], b, state.model_state, jax.random.fold_in(rng, i)
            )[0]
            for i, b in enumerate(inner)
        ]
        return sum(values) / len(values)

    def upper(z):
        return problem.outer_loss(to_z(z), None, outer[0], state.model_state, None)[0]

    x = state.outer_params

    @jax.jit
    def by_hand(z, x):
        hessian = jax.hessian(total)(z, x)
        v = jnp.linalg.solve(hessian, -jax.grad(upper)(z))
        return hessian, jax.jvp(lambda z: jax.grad(total, 1)(z, x), (z,), (v,))[1]

    hessian, expected = by_hand(z, x)
    np.testing.assert_allclose(found.reference, expected, rtol=1e-5, atol=1e-8)
    values = np.linalg.eigvalsh(hessian)
    assert found.smallest_curvature == pytest.approx(values[0])
    assert found.negative_curvature == (values[0] < 0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "cg"}, "method='cg' is unknown"),
        ({"outer": []}, "outer=.* holds no data"),
        ({"damping": -1.0}, "damping=-1.0 must be >= 0"),
        ({"max_iterations": 0}, "max_iterations must be an integer >= 1, got 0"),
        ({"outer": bf.Batch(1.0, 2.0)}, "outer is a Batch: hand its two sides over"),
        ({"inner": [{"a": jnp.ones(2)}, {"a": jnp.ones(3)}]}, "inner holds .*several shapes"),
    ],
)
def test_mistakes_are_named(source: Any, keywords: dict, message: str):
    sides = {"inner": source.inner_batches, "outer": source.outer_batches} | keywords
    with pytest.raises(ValueError, match=message):
        check(source.problem, source.random_variables(), **sides)


@pytest.mark.parametrize("method", ["dense", "minres"])
def test_what_is_not_finite_is_not_called_solved(method: str):
    """A residual of NaN was reported as 0: perfect."""
    problem = bf.Problem(
        lambda z, x, _: jnp.sum((z - x) ** 4), lambda z, x, _: jnp.sum((z - 1) ** 2)
    )
    point = bf.Variables(jnp.full(2, jnp.nan), jnp.ones(2), jnp.zeros(()))
    found = check(problem, point, 0.0, 0.0, method=method)
    assert np.isnan([found.adjoint_residual, found.reference_residual, found.cosine]).all()
    assert not found.converged


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["dense", "minres"])
def test_more_parameters_than_examples_leave_the_exact_adjoint_at_cosine_one(method, dtype):
    rng = np.random.default_rng(0)
    design = rng.normal(size=(6, 30)) * np.geomspace(1, 3, 6)[:, None]
    rows, tilt = jnp.asarray(design, dtype), jnp.asarray(rng.normal(size=30), dtype)
    problem = bf.Problem(
        inner_loss=lambda z, x, batch: 0.5 * jnp.sum((rows @ z - x) ** 2),
        outer_loss=lambda z, x, batch: tilt @ z + 0 * x.sum(),
    )
    v = -np.linalg.pinv(design.T @ design) @ np.asarray(tilt, np.float64)
    point = bf.Variables(jnp.zeros(30, dtype), jnp.asarray(v, dtype), jnp.ones(6, dtype))
    one = jnp.ones(1)
    found = check(problem, point, one, one, method=method)
    assert found.cosine == pytest.approx(1, abs=1e-4)
    assert found.relative_error < 0.01
    assert not found.converged


@pytest.mark.parametrize("method", ["dense", "minres"])
def test_parameters_that_never_move_are_no_variables_of_the_system(method: str):
    """h* = x; b is frozen at 0, but G is far from separable in it."""
    problem = bf.Problem(
        lambda z, x, _: 0.5 * z["h"] ** 2 - x * z["h"] + 3 * z["b"] * z["h"] + 9 * z["b"] ** 2,
        lambda z, x, _: 0.5 * (z["h"] - 2.0) ** 2 + 0.5 * x**2 + 5 * z["b"],
    )
    x, zero = jnp.array(0.5), jnp.array(0.0)
    point = bf.Variables({"h": x, "b": zero}, {"h": 2 - x, "b": zero}, x)
    moves = {"h": True, "b": False}
    one = jnp.ones(1)
    found = check(problem, point, one, one, method=method, trainable=moves)
    assert float(found.reference) == pytest.approx(0.5 - 2 + 0.5)  # h - 2 + x
    assert found.adjoint_residual == pytest.approx(0, abs=1e-12)
    assert found.smallest_curvature == pytest.approx(1)
    source = data.partition({"a": np.ones(2)}, 1, shuffle=False)
    sums = problem, point, source, source
    assert diagnostics.adjoint_residual(*sums, trainable=moves) == pytest.approx(0, abs=1e-12)
    assert diagnostics.adjoint_residual(*sums) > 0.5
    with pytest.raises(ValueError, match="not a pytree prefix of inner_params"):
        check(problem, point, one, one, trainable={"h": True})
    with pytest.raises(ValueError, match="leaves no parameter"):
        check(problem, point, one, one, trainable=False)
