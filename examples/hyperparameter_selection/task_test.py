import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import cli
from bilevel_flax.bench import tasks as bench_tasks
from bilevel_flax.bench.tasks import Context, Setting
from bilevel_flax.train import config
from bilevel_flax.train.step_runner import StepRunner
from examples.datasets import catalog, ijcnn1
from examples.hyperparameter_selection import bench, exact, features, optimizers, task

CONFIG = str(Path(__file__).parents[2] / "configs" / "hyperparameter_selection.py")


def small(num_classes=0, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(5, num_classes or 1))

    def draw(n):
        inputs = rng.normal(size=(n, 5))
        scores = inputs @ truth + rng.gumbel(size=(n, num_classes or 1))
        labels = scores.argmax(1) if num_classes else np.where(scores[:, 0] > 0, 1, -1)
        return exact.Data(inputs, labels)

    return features.Features(draw(60), draw(40), num_classes)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_exact_solution_zeroes_the_gradient_of_our_loss(num_classes, x64):
    table = small(num_classes)
    reference, problem = task.exact_problem(table), task.make_problem()
    size = task.num_penalties(table)
    x = np.random.default_rng(1).normal(size=size)
    z = reference.solve(x).reshape((5, size) if num_classes else (5,))
    inner = task.as_arrays(table.train, num_classes)
    outer = task.as_arrays(table.validation, num_classes)
    gradient, value = jax.jit(jax.grad(problem.inner_loss)), jax.jit(problem.outer_loss)
    np.testing.assert_allclose(gradient(z, x, inner), 0, atol=1e-11)
    np.testing.assert_allclose(value(z, x, outer), reference.value(x), rtol=1e-12)


def at_the_exact_adjoint(problem, z, x, batch):
    """The oracles at v = -H⁻¹ ∇₁F, in one program."""

    @jax.jit
    def evaluation(z, x, batch):
        loss = lambda flat: problem.inner_loss(flat.reshape(z.shape), x, batch.inner)
        right = jax.grad(problem.outer_loss)(z, x, batch.outer)
        v = -jnp.linalg.solve(jax.hessian(loss)(z.ravel()), right.ravel()).reshape(z.shape)
        return bf.oracles.evaluate(problem, bf.Variables(z, v, x), batch)

    return evaluation(z, x, batch)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_exact_gradient_is_the_hypergradient_of_our_losses(num_classes, x64):
    table = small(num_classes)
    reference, problem = task.exact_problem(table), task.make_problem()
    size = task.num_penalties(table)
    x = np.random.default_rng(1).normal(size=size)
    z = jnp.asarray(reference.solve(x)).reshape((5, size) if num_classes else (5,))
    batch = bf.Batch(
        task.as_arrays(table.train, num_classes), task.as_arrays(table.validation, num_classes)
    )
    found: Any = at_the_exact_adjoint(problem, z, x, batch)
    hypergradient = found.cross_jvp + found.outer_grad_outer
    np.testing.assert_allclose(reference.value_and_grad(x)[1], hypergradient, atol=1e-10)


def test_the_optimum_is_stationary_or_on_the_box_and_not_above_any_start():
    table = small()
    reference = task.exact_problem(table)
    best = reference.optimum(5, starts=(-6.0, -2.0))
    _, gradient = reference.value_and_grad(best.x)
    inside = (best.x > exact.BOUNDS[0]) & (best.x < exact.BOUNDS[1])
    np.testing.assert_allclose(gradient[inside], 0, atol=1e-6)
    assert (gradient[best.x == exact.BOUNDS[0]] >= 0).all()
    assert (gradient[best.x == exact.BOUNDS[1]] <= 0).all()
    assert best.stationarity < 1e-14
    assert best.value - 1e-15 <= min(best.from_each_start) <= reference.value(np.full(5, -2.0))


def test_a_point_that_is_not_finite_has_no_value():
    reference = task.exact_problem(small())
    with pytest.raises(ArithmeticError):
        reference.value(np.full(5, np.nan))


def test_a_growing_penalty_destroys_plain_sgd_and_not_ours():
    x = jnp.full(3, 8.0)

    def descend(inner):
        z: Any = jnp.ones(3)
        state = inner.init(z)
        for _ in range(50):
            step, state = inner.update(jnp.exp(x) * z, state, z, outer_params=x)
            z = optax.apply_updates(z, step)
        return float(jnp.abs(z).max())

    plain = optax.with_extra_args_support(optax.sgd(0.1))
    assert not descend(plain) < 1e6
    assert descend(optimizers.penalty_aware_sgd(0.1)) < 1e-6


def test_a_small_penalty_leaves_plain_sgd():
    inner: Any = optimizers.penalty_aware_sgd(0.5)
    z = jnp.ones((3, 2))
    gradient = jnp.arange(6.0).reshape(3, 2)
    step, _ = inner.update(gradient, inner.init(z), z, outer_params=jnp.full(2, -40.0))
    np.testing.assert_allclose(step, -0.5 * gradient, rtol=1e-6)


def test_a_margin_below_newtons_step_is_refused():
    with pytest.raises(ValueError, match="margin=0.5"):
        optimizers.penalty_aware_sgd(1.0, margin=0.5)


def test_penalty_aware_sgd_says_what_it_lacks():
    inner = optimizers.penalty_aware_sgd(0.5)
    with pytest.raises(ValueError, match="needs outer_params"):
        inner.update(jnp.ones(2), inner.init(jnp.ones(2)))


def test_saba_finds_the_optimum_of_a_small_problem():
    table = small()
    loaded = config.load(CONFIG, ["batch_size=16"])
    made = task.make_task(loaded, table)
    reference = task.exact_problem(table)
    start = made.init(jax.random.PRNGKey(0))
    solver = bf.saba(
        made.problem,
        inner=optimizers.penalty_aware_sgd(0.3),
        outer=optimizers.penalty_adam(0.02, 4000),
        num_inner_batches=made.inner.num_batches,
        num_outer_batches=made.outer.num_batches,
        inner_weights=made.inner.weights if made.inner.ragged else None,
        outer_weights=made.outer.weights if made.outer.ragged else None,
    )
    state, step = solver.init(start.inner_params, start.outer_params), 0
    loop = StepRunner(solver, made.inner, made.outer)
    before = made.evaluate(state)["validation_loss"]
    while step < 20_000:
        state, info = loop.run(state, step, 20_000)
        step += len(info.inner_loss)
    after = made.evaluate(state)["validation_loss"]
    best = reference.optimum(5).value
    assert after - best < 1e-3 * (before - best)


def test_train_writes_the_gap(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "starts", lambda name, length: [])  # the run's end alone
    arguments = ["--config.steps=2000", "--config.eval_every=1000", "--config.log_every=1000"]
    arguments += ["--config.health.every=0", "--config.health.summary=false"]
    workdir = tmp_path / "run"
    code = cli.main(["train", "--config", CONFIG, "--workdir", str(workdir), *arguments])
    summary = json.loads((workdir / "summary.json").read_text())
    assert code == 0 and len(summary["penalties"]) == 30
    assert summary["gap"] == pytest.approx(summary["validation_loss"] - summary["optimum"])
    assert summary["gap"] >= 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.name=ijcnn", 'did you mean "ijcnn1"'),
        ("data.name=ijcnn1", "ijcnn1.trn.bz2"),
        ("start=nan", "start=nan"),
    ],
)
def test_mistakes_end_in_one_line(override, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(catalog, "reachable", lambda url: False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    arguments = ["train", "--config", CONFIG, "--workdir", str(tmp_path / "r")]
    assert cli.main([*arguments, f"--config.{override}"]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1


def test_an_unknown_solver_names_the_nearest():
    with pytest.raises(config.ConfigError, match='did you mean "saba"'):
        config.load(f"{CONFIG}:sabba")
    with pytest.raises(config.ConfigError, match='did you mean "ijcnn1"'):
        config.load(f"{CONFIG}:saba,ijcn1")


def test_the_series_of_explicit_methods_stays_stable(tmp_path):
    setting = Setting(8.0, 1.0, 0.0, 0.0, 22.0, True, True)
    chosen = bench.make_optimizers("ijcnn1", setting)

    def body(_, carry):
        x, state = carry
        step, state = chosen.outer.update(-jnp.ones(3), state, x)
        return optax.apply_updates(x, step), state

    zero = jnp.zeros(3)
    x, _ = jax.lax.fori_loop(0, 2000, body, (zero, chosen.outer.init(zero)))
    assert float(x.max()) < 12
    assert float(chosen.adjoint_step * jnp.exp(x).max()) < 1


def test_the_optimum_is_kept_and_lowered_by_a_run_below_it(tmp_path):
    solver: Any = task.exact_problem(small())
    path = tmp_path / "optimum_small.json"
    begin = lambda: bench.Reference(path, solver, 5, (12.0,), exact.BOUNDS)
    path.write_text('{"value": 0.9}')  # of a search that ended in a bad minimum
    first, other = begin(), begin()
    assert first.best() == 0.9
    point = np.full(5, -2.0)
    assert first.value(point) < 0.9
    lowest = first.best()
    assert lowest < solver.value(point) and other.best() == lowest
    assert lowest == pytest.approx(solver.optimum(5).value, abs=1e-12)
    solver.optimum = lambda *args: pytest.fail("searched again")
    assert first.value(point) > lowest and begin().best() == lowest
    assert np.isnan(first.value(np.full(5, np.nan))) and first.best() == lowest
    path.write_text("{}")
    with pytest.raises(config.ConfigError, match="holds no optimum"):
        begin()


def test_covtype_subset(data_dir, tmp_path):
    table = features.load("covtype10k", str(data_dir / "covtype10k"))
    assert table.train.inputs.shape == (4858, 54) and table.validation.inputs.shape == (5142, 54)
    assert table.train.labels.sum() == 2386 and table.num_classes == 2
    # Almost no penalty, and a softmax that its shifts leave unchanged: Newton has to find an end.
    reference = task.exact_problem(table)
    for x in ([-24.0, -24.0], [-25.0, -24.0], [-25.0, -25.0]):
        assert reference.value(np.array(x)) == pytest.approx(0.528, abs=4e-4)
    (tmp_path / "optimum_covtype10k.json").write_text('{"value": 0.5}')
    made = bench_tasks.make("covtype10k", Context(0, str(data_dir), tmp_path, lambda line: None))
    start = made.task.init(jax.random.PRNGKey(0))
    assert start.inner_params.shape == (54, 2) and start.outer_params.shape == (2,)


@pytest.mark.parametrize("start", [-9.0, -3.0])
def test_the_hypergradient_on_covtype_against_differences_of_h(start, data_dir, x64):
    table = features.load("covtype10k", str(data_dir))
    reference, problem = task.exact_problem(table), task.make_problem()
    x = np.array([start, start + 1.0])
    differences = [
        (reference.value(x + shift) - reference.value(x - shift)) / 2e-4
        for shift in 1e-4 * np.eye(2)
    ]
    z = jnp.asarray(reference.solve(x)).reshape(54, 2)
    inner, outer = task.as_arrays(table.train, 2), task.as_arrays(table.validation, 2)
    found: Any = at_the_exact_adjoint(problem, z, x, bf.Batch(inner, outer))
    np.testing.assert_allclose(found.cross_jvp + found.outer_grad_outer, differences, rtol=1e-6)


def test_the_published_optimum_of_ijcnn1(data_dir):
    parts = {
        name: ijcnn1.parse(data_dir / "ijcnn1" / part.filenames[0], part)
        for name, part in ijcnn1.PARTS.items()
    }
    train, validation = exact.Data(*parts["train"]), exact.Data(*parts["test"])
    assert (train.labels == 1).sum() == 3415 + 1438 and (validation.labels == 1).sum() == 8712
    # x of the optimum that an independent search found, one digit each.
    x = [-7.91, -7.57, -6.47, -25, -25, -25, -6.6, -25, -25, -25, 12] + [-25] * 5
    x += [-8.36, -25, -8.78, -25, -25, -25]
    reference = task.exact_problem(features.Features(train, validation, 0))
    assert reference.value(np.array(x)) == pytest.approx(0.2034980, abs=2e-7)
