import csv
import math
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.model_selection import train_test_split

from benchmarks.tasks import quadratics as quadratic_task
from benchmarks.tasks.tuned import TUNED
from bilevel_flax import bench, cli
from bilevel_flax.base import Batch
from bilevel_flax.bench import folder, methods, protocol, results, searches, steps, tasks
from bilevel_flax.bench import report as bench_report
from bilevel_flax.bench.options import grid
from bilevel_flax.bench.results import DIVERGED, FINISHED, SCREENED, Key, Row
from bilevel_flax.bench.runner import Runner
from bilevel_flax.bench.tasks import Context, Setting
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.train.config import ConfigError
from examples.datasets import catalog
from examples.mnist_hypercleaning import published

SMALL = {"samples": 128, "outer_samples": 128, "inner_size": 4, "outer_size": 3}
REQUIRED = ["task", "solver", "seed", "params", "iteration", "seconds", "cpu_seconds"]
REQUIRED += ["oracle_units", "value", "gap"]


def context(tmp_path, seed=0):
    return Context(seed, None, tmp_path, lambda line: None)


@pytest.fixture(scope="module")
def small():
    """The quadratics task, small enough for a run to take no time."""
    make = quadratic_task.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadratic_task, "make", lambda name, c, **sizes: make(name, c, **SMALL))
        yield


@pytest.fixture(scope="module")
def ran(small, tmp_path_factory):
    """One bench of two methods and two seeds: (its folder, its runs, what it said)."""
    folder = tmp_path_factory.mktemp("bench")
    runs, lines = quadratics(folder, solvers=("soba", "saba"), seeds=2)
    return folder / "out", runs, lines


@pytest.fixture(scope="module")
def searched(small, tmp_path_factory):
    """One bench of the two searches: its runs."""
    folder = tmp_path_factory.mktemp("searches")
    return quadratics(folder, solvers=("grid_search", "random_search"), seconds=1.0)[0]


def quadratics(tmp_path, **options):
    # CPU time: a busy machine must not turn a budget into none.
    settings = {"task": "quadratics", "solvers": ("soba",), "seconds": 0.05, "clock": "cpu"}
    settings |= options
    lines = []
    runs = bench.run(bench.Options(out=tmp_path / "out", **settings), lines.append)
    return runs, lines


def row(gap=1.0, status="", **changes):
    values = {"task": "t", "solver": "soba", "seed": 0, "params": "rho=1,ratio=1", "iteration": 1}
    values |= {"seconds": 1.0, "cpu_seconds": 1.0, "oracle_units": 4.0, "value": gap}
    return Row(**(values | {"gap": gap, "validation": gap, "status": status} | changes))


# Quadratics: the closed form.


def test_the_closed_form_is_what_the_losses_say(x64):
    inner, outer = quadratic_task.draw(0, **SMALL)
    exact = quadratic_task.means(inner, outer)
    z, x = np.random.default_rng(1).normal(size=4), np.random.default_rng(2).normal(size=3)

    inner_loss = lambda z, x: quadratic_task._inner_loss(z, x, inner)
    outer_loss = lambda z, x: quadratic_task._outer_loss(z, x, outer)
    gradient = exact.hessian @ z + exact.coupling @ x + exact.linear
    np.testing.assert_allclose(jax.jit(jax.grad(inner_loss))(z, x), gradient, atol=1e-12)

    def h(x):  # by solving the inner problem with JAX, in one Newton step from 0
        zero = jnp.zeros(4)
        step = jnp.linalg.solve(jax.hessian(inner_loss)(zero, x), jax.grad(inner_loss)(zero, x))
        return outer_loss(-step, x)

    value, found = exact.value_and_grad(x)
    expected, expected_gradient = jax.jit(jax.value_and_grad(h))(x)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(found, expected_gradient, atol=1e-11)


def test_no_point_is_better_than_the_minimiser():
    exact = quadratic_task.means(*quadratic_task.draw(0, **SMALL))
    best = exact.minimiser()
    value, gradient = exact.value_and_grad(best)
    np.testing.assert_allclose(gradient, 0, atol=1e-10)
    for step in np.random.default_rng(0).normal(size=(20, 3)):
        assert exact.value_and_grad(best + step)[0] > value


# Solvers by name.


def test_every_method_is_found_and_built(tmp_path):
    task = quadratic_task.make("quadratics", context(tmp_path), **SMALL)
    names = methods.names()
    assert {"soba", "saba", "srba", "amigo", "stocbio", "ttsa", "vrbo", "f2sa"} <= set(names)
    assert not {"single_loop", "inner_only"} & set(names)
    for name in names:
        solver = methods.build(name, task, 0.1, 1.0)
        assert solver.name.startswith("inner_only" if name in methods.SEARCHES else name)


def test_all_methods_are_handed_the_same_steps_up_to_their_published_decay(tmp_path):
    task = quadratic_task.make("quadratics", context(tmp_path), **SMALL)
    seen: dict[str, Setting] = {}
    for name in ("soba", "saba", "amigo", "stocbio"):
        record = lambda setting, name=name: (
            seen.__setitem__(name, setting) or quadratic_task.optimizers(setting)
        )
        methods.build(name, task._replace(optimizers=record), 0.5, 0.1)
    assert all((s.rho, s.ratio) == (0.5, 0.1) for s in seen.values())
    assert seen["soba"].inner_decay == 0.5 and seen["saba"].inner_decay == 0
    assert seen["saba"].units == 4 and seen["amigo"].units == 22
    assert seen["stocbio"].explicit_adjoint and not seen["amigo"].explicit_adjoint


def test_recorded_pairs_are_pairs_of_the_grid():
    texts = {results.params_text(*pair) for pair in grid(63)}
    assert set(TUNED) <= set(tasks.TASKS)
    for recorded in TUNED.values():
        assert set(recorded) <= set(methods.names())
        assert {results.params_text(*pair) for pair in recorded.values()} <= texts


def test_grid_pairs_are_the_published_ones():
    pairs = grid(63)
    assert len(set(pairs)) == 63 and grid(7) == pairs[:7]
    rhos, ratios = ({pair[k] for pair in pairs} for k in (0, 1))
    assert (min(rhos), max(rhos), len(rhos)) == (2**-5, 2**3, 9)
    np.testing.assert_allclose([min(ratios), max(ratios)], [1e-2, 1e1])


# A bench: files, columns, resuming.


def test_results_have_the_columns_and_count_what_was_spent(ran):
    out, runs, lines = ran
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[: len(REQUIRED)] == REQUIRED
    assert {(r["solver"], r["seed"]) for r in rows} == {
        (s, k) for s in ("soba", "saba") for k in ("0", "1")
    }
    for group in runs.values():
        assert group[0].iteration == 0 and group[0].oracle_units == 0
        assert group[-1].status == FINISHED and not any(r.status for r in group[:-1])
        assert group[-1].cpu_seconds >= 0.05
        for one in group:
            assert one.oracle_units == 4 * one.iteration
        for name in ("iteration", "seconds", "cpu_seconds", "oracle_units"):
            values = [getattr(one, name) for one in group]
            assert values == sorted(values)
        # How far .05 s of CPU time lead depends on the machine; that they lead down does not.
        assert group[-1].gap < group[0].gap
    page = (out / "bench.html").read_text()
    assert "<svg" in page and "saba" in page and "http://" not in page.replace("http://www.w3", "")
    assert any("saba" in line and "final h - h*" in line for line in lines[-2:])


def test_full_passes_are_counted(small, tmp_path):
    (group,) = quadratics(tmp_path, solvers=("srba",), seconds=0.3)[0].values()
    # 2 + 2 minibatches: a pass of 3 · 2 + 2 units before every 4 steps of 8 units.
    last = group[-1]
    passes = (last.oracle_units - 8 * last.iteration) / 8
    # The budget may end within the pass that is due next.
    assert math.ceil(last.iteration / 4) <= passes <= last.iteration // 4 + 1


def again(ran, tmp_path, **options):
    """The module's bench once more, in a copy of its folder."""
    if not (tmp_path / "out").exists():
        shutil.copytree(ran[0], tmp_path / "out")
    return quadratics(tmp_path, **({"solvers": ("soba", "saba"), "seeds": 2} | options))


def test_the_same_command_again_runs_nothing(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "run", lambda *args: pytest.fail("ran again"))
    assert again(ran, tmp_path)[0].keys() == ran[1].keys()
    before = (ran[0] / "results.csv").read_text()
    assert (tmp_path / "out" / "results.csv").read_text() == before


def test_a_run_that_was_cut_off_is_done_again_and_the_others_are_kept(ran, tmp_path):
    shutil.copytree(ran[0], tmp_path / "out")
    path = tmp_path / "out" / "results.csv"
    whole = path.read_text().splitlines(keepends=True)
    first_of_last = next(i for i, line in enumerate(whole) if ",saba,1," in f",{line}")
    kept, cut = whole[:first_of_last], whole[first_of_last : first_of_last + 2]
    path.write_text("".join(kept + cut) + "quadratics,saba,1,rho")
    runs, lines = again(ran, tmp_path)
    assert path.read_text().splitlines(keepends=True)[: len(kept)] == kept
    assert [line for line in lines if line.startswith("[")] == [
        line for line in ran[2] if line.startswith("[") and "saba, seed 1" in line
    ]
    assert all(group[-1].status == FINISHED for group in runs.values())
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seconds": 0.06}, "seconds 0.05, not 0.06"),
        ({"clock": "wall"}, "clock 'cpu', not 'wall'"),
        ({"grid": 3}, "grid 0, not 3"),
        ({"task": "ijcnn1"}, "task 'quadratics', not 'ijcnn1'"),
        ({"task": "darts_micro", "seconds": None, "clock": "wall"}, "not 'darts_micro'"),
    ],
)
def test_a_folder_with_another_bench_is_refused(options, says, ran, tmp_path):
    with pytest.raises(ConfigError, match=says) as caught:
        again(ran, tmp_path, **({"solvers": ("soba",)} | options))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    for name in ("results.csv", "bench.json"):
        assert (tmp_path / "out" / name).read_text() == (ran[0] / name).read_text()


def test_a_folder_with_other_data_is_refused(ran, tmp_path, monkeypatch):
    draw = quadratic_task.draw
    monkeypatch.setattr(quadratic_task, "draw", lambda seed, **sizes: draw(seed + 1, **sizes))
    with pytest.raises(ConfigError, match="data '[0-9a-f]{8}', not '[0-9a-f]{8}'"):
        again(ran, tmp_path)


def test_a_folder_is_one_process_at_a_time(ran, tmp_path):
    shutil.copytree(ran[0], tmp_path / "out")
    with folder.lock(tmp_path / "out"), pytest.raises(ConfigError, match="another process"):
        again(ran, tmp_path)


def test_what_no_bench_wrote_is_refused(ran, tmp_path):
    shutil.copytree(ran[0], tmp_path / "out")
    (tmp_path / "out" / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="which no bench wrote"):
        again(ran, tmp_path)


def test_a_run_below_the_reference_lowers_it_for_all(ran, tmp_path, monkeypatch):
    """Gaps are measured against the best value known at the end, not at the time."""
    exact = quadratic_task.means(*quadratic_task.draw(0, **SMALL))
    monkeypatch.setattr(quadratic_task.Means, "minimiser", lambda self: np.ones(3))
    raised = exact.value_and_grad(np.ones(3))[0]
    runs, _ = again(ran, tmp_path)
    for key, rows in runs.items():
        assert [one.gap for one in rows] == [one.value - raised for one in rows]
        assert [one.value for one in rows] == [one.value for one in ran[1][key]]


def test_the_grid_is_searched_with_equal_effort_and_selects_by_validation(small, tmp_path):
    runs, _ = quadratics(tmp_path, solvers=("soba", "saba"), grid=3)
    every = results.read(tmp_path / "out" / "results.csv")
    tried = {name: [k for k in every if k.solver == name] for name in ("soba", "saba")}
    texts = {results.params_text(*pair) for pair in grid(3)}
    assert {k.params for k in tried["soba"]} == {k.params for k in tried["saba"]} == texts
    for key in runs:
        scores = {k: results.score(every[k]) for k in tried[key.solver]}
        assert scores[key] == min(scores.values())


def test_only_the_chosen_pair_of_a_grid_is_measured_at_many_times(small, tmp_path, monkeypatch):
    # Both pairs are stable: how many steps fit in the budget depends on the machine.
    monkeypatch.setattr(protocol, "grid", lambda count: [(0.25, 1.0), (0.125, 1.0)][:count])
    (chosen,) = quadratics(tmp_path, grid=2)[0].values()
    assert chosen[-1].status == FINISHED and len(chosen) > 5
    every = results.read(tmp_path / "out" / "results.csv")
    others = [rows for key, rows in every.items() if key != chosen[0].key]
    # Had the second run gone worse than another pair, the choice would still be the same one.
    assert math.isfinite(chosen[-1].screened) and results.score(chosen) == chosen[-1].screened
    assert results.score(chosen) == min(map(results.score, every.values()))
    assert len(every) == 2 and all(rows[-1].status == SCREENED for rows in others)
    assert all(len(rows) <= 5 for rows in others)


def test_a_diverged_run_is_a_row_and_no_crash(small, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "grid", lambda count: [(1e6, 1.0), (0.25, 1.0)][:count])
    runs, lines = quadratics(tmp_path, grid=2)
    every = results.read(tmp_path / "out" / "results.csv")
    bad = every[Key("soba", 0, "rho=1e+06,ratio=1")]
    assert bad[-1].status == DIVERGED and math.isnan(bad[-1].gap) and bad[-1].iteration > 0
    assert [key.params for key in runs] == ["rho=0.25,ratio=1"]
    assert any("diverged at step" in line for line in lines)


# Steps in the state.


@pytest.mark.parametrize("name", ["soba", "saba", "stocbio"])
def test_steps_in_the_state_are_the_same_steps(tmp_path, name):
    task = quadratic_task.make("quadratics", context(tmp_path), **SMALL)
    build = lambda rho, ratio: methods.build(name, task, rho, ratio)
    assert steps.can_vary(build)
    other = steps.with_steps(build, 9.0, 3.0)  # its function, the state's steps
    start = task.task.init(jax.random.PRNGKey(0))
    ends = []
    for solver, update in (
        (build(0.1, 0.5), build(0.1, 0.5)),
        (steps.with_steps(build, 0.1, 0.5), other),
    ):
        state = solver.init(*start[:2])
        batch = Batch(
            *(
                jax.tree.map(lambda leaf, k=k: take(leaf, k), side.batches)
                for side, k in zip((task.task.inner, task.task.outer), solver.batches, strict=True)
            ),
            *(take(np.arange(2, dtype=np.int32), k) for k in solver.batches),
        )
        for _ in range(3):
            state, _ = jax.jit(update.update)(state, batch)
        ends.append(state)
    for one, two in zip(ends[0].variables, ends[1].variables, strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=1e-7)
    assert np.abs(np.asarray(ends[0].outer_params) - 1).max() > 1e-4


def take(leaf, count):
    """The first minibatch, or `count` of them."""
    return leaf[0] if count == 1 else leaf[np.arange(count) % len(leaf)]


def test_what_needs_its_steps_at_once_is_told_apart():
    assert not steps.can_vary(lambda rho, ratio: 1.0 if rho < 1 else 2.0)


# Searches over x.


def test_searches_find_a_better_x_within_the_budget_of_a_method(searched, tmp_path):
    task = quadratic_task.make("quadratics", context(tmp_path))
    for key, rows in searched.items():
        last = rows[-1]
        assert last.status == FINISHED and last.gap < rows[0].gap
        # A trial may end half a chunk late, and a chunk takes longer on a busy machine.
        assert 0.5 < last.cpu_seconds < 4
        # A unit an inner step, and F on the outer minibatches for each candidate.
        judged = searches.candidates(task.default[1]) * task.task.outer.num_batches
        assert last.oracle_units == last.iteration + judged, key


def test_a_grid_search_returns_the_candidate_with_the_lowest_loss(searched):
    exact = quadratic_task.means(*quadratic_task.draw(0, **SMALL))
    (rows,) = (rows for key, rows in searched.items() if key.solver == "grid_search")
    values = [exact.value_and_grad(np.full(3, c))[0] for c in np.linspace(*quadratic_task.BOX, 30)]
    # z is trained by few noisy steps, so it may choose a neighbour of the best one.
    assert min(abs(rows[-1].value - value) for value in values) < 1e-5 * max(values)
    assert rows[-1].value <= sorted(values)[6] * (1 + 1e-5)


def test_plain_training_hands_x_to_its_optimiser(tmp_path):
    """A search trains with the same optimisers as the methods, some of which look at x."""
    step = lambda updates, state, params=None, *, outer_params, **_: (
        outer_params[0] + 0 * updates,
        state,
    )
    inner = optax.GradientTransformationExtraArgs(lambda params: (), step)
    task = quadratic_task.make("quadratics", context(tmp_path), **SMALL).task
    solver = inner_only(task.problem, inner=inner)
    state = solver.init(jnp.zeros(4), jnp.full(3, 2.0))
    batch = Batch(jax.tree.map(lambda leaf: leaf[0], task.inner.batches))
    assert solver.update(state, batch)[0].inner_params.tolist() == [2.0] * 4


def test_searches_that_cannot_take_a_step_or_make_no_sense_are_refused(small, tmp_path):
    with pytest.raises(ConfigError, match=r"--seconds=1e-06, grid_search: .* one step takes"):
        quadratics(tmp_path, solvers=("grid_search",), seconds=1e-6)
    task = quadratic_task.make("quadratics", context(tmp_path))._replace(box=None)
    with pytest.raises(ConfigError, match="a weight for every training example"):
        searches.check("random_search", task)


def test_a_search_whose_trials_all_diverge_is_a_row(small, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "grid", lambda count: [(1e30, 1.0)][:count])
    (rows,) = quadratics(tmp_path, solvers=("random_search",), grid=1)[0].values()
    assert rows[-1].status == DIVERGED and math.isnan(rows[-1].gap)


# Numbers that are shown.


def test_a_level_counts_only_once_the_gap_stays_below():
    gaps = [1.0, 0.05, 0.2, 0.05, 0.01]
    rows = [row(gap, seconds=float(i)) for i, gap in enumerate(gaps)]
    assert results.time_below(rows, 0.1, "seconds") == 3.0
    assert results.time_below(rows, 1e-3, "seconds") == math.inf
    assert results.time_below([*rows, row(math.nan)], 0.1, "seconds") == math.inf


def test_bands_are_quantiles_of_step_functions_and_a_diverged_run_is_the_worst():
    places = (0.0, 1.0, 10.0)
    group = [
        [row(gap * factor, seconds=place) for gap, place in zip((1, 0.5, 0.1), places, strict=True)]
        for factor in (1.0, 2.0, 3.0)
    ]
    group[2][-1] = row(math.nan, DIVERGED, seconds=10.0)
    where, middle, low, high = bench_report.band(group, "seconds")
    assert where[0] == pytest.approx(1.0) and where[-1] == pytest.approx(10.0)
    assert (middle[0], low[0], high[0]) == (1.0, 0.5, 1.5)
    assert (middle[100], low[100]) == (1.0, 0.5)
    assert (middle[-1], low[-1], high[-1]) == (pytest.approx(0.2), 0.1, math.inf)


def test_written_rows_are_read_back(tmp_path):
    rows = [row(0.1 + 0.2, screened=0.1), row(math.nan, DIVERGED)]
    results.write(tmp_path / "r.csv", {rows[0].key: rows})
    (found,) = results.read(tmp_path / "r.csv").values()
    assert found[0] == rows[0] and math.isnan(found[1].gap) and found[1].status == DIVERGED
    assert results.score(found) == math.inf


# Mistakes: one line each.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ijcnn"], 'did you mean "ijcnn1"'),
        (["quadratics", "--solvers", "sabba"], 'did you mean "saba"'),
        (["quadratics", "--solvers", "soba,soba"], "twice"),
        (["quadratics", "--solvers", ","], "--solvers is empty"),
        (["quadratics", "--seconds", "0"], "--seconds=0"),
        (["quadratics", "--seconds", "nan"], "--seconds=nan"),
        (["quadratics", "--seeds", "0"], "--seeds=0"),
        (["quadratics", "--grid", "64"], "--grid=64: there are 63 pairs"),
        (["quadratics", "--grid", "-1"], "--grid=-1"),
        (["quadratics", "--clock", "sun"], "--clock=sun"),
        (["ijcnn1", "--manual-dir", "/nowhere"], "--manual-dir=/nowhere"),
        (["ijcnn1"], "ijcnn1.trn.bz2"),
        (["covtype10k"], "covtype.5000.train.csv.gz"),
    ],
)
def test_mistakes_end_in_one_line(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))  # ijcnn1 may lie prepared in the user's
    monkeypatch.setattr(catalog, "reachable", lambda url: False)
    assert cli.main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out=.*/file/below.*: Not a directory"):
        quadratics(tmp_path / "file" / "below")


def test_a_budget_without_a_step_is_refused(small, tmp_path):
    with pytest.raises(ConfigError, match=r"--seconds=1e-09: soba took .* first step"):
        quadratics(tmp_path, seconds=1e-9)
    with pytest.raises(ConfigError, match="full passes count"):
        quadratics(tmp_path / "b", seconds=1e-9, solvers=("srba",))


def test_every_task_on_the_list_can_be_imported():
    from bilevel_flax.train import config

    for target in tasks.TASKS.values():
        assert callable(config.imported(target))


def test_the_published_split_of_mnist(data_dir):
    """Labels of the first training digits, as scikit-learn's train_test_split draws them."""
    examples = published.load_examples(data_dir / "mnist", 0.7)
    everything = published._read(data_dir / "mnist", "train")[1]
    rng = np.random.RandomState(32)
    train, validation = train_test_split(
        np.arange(60_000), train_size=20_000, test_size=5_000, random_state=rng
    )
    np.testing.assert_array_equal(examples.true_labels, everything[train])
    np.testing.assert_array_equal(examples.validation_labels, everything[validation])
    drawn = rng.rand(20_000) < 0.7
    given = np.where(drawn, -1, examples.true_labels)
    given[drawn] = rng.randint(0, 10, drawn.sum())
    np.testing.assert_array_equal(examples.given_labels, given)
    assert abs(examples.is_wrong.mean() - 0.63) < 0.01 and len(examples.test_labels) == 10_000


def test_the_published_split_names_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="lacks .*train-images-idx3-ubyte.gz"):
        published.load_examples(tmp_path, 0.5)


def test_the_quadratics_task_of_published_size_is_well_conditioned(tmp_path):
    inner, outer = quadratic_task.draw(0, **quadratic_task.SIZES)
    assert len(inner["a"]) == 32_768 and len(outer["p"]) == 1_024
    eigenvalues = np.linalg.eigvalsh(inner["a"].T @ inner["a"] / 32_768)
    assert eigenvalues[0] > 0.08 and eigenvalues[-1] < 1.2


def test_a_curve_that_reaches_the_best_value_goes_on():
    """A gap of 0, or below by rounding, is no divergence."""
    gaps = (1.0, 0.1, 0.0, -1e-17)
    rows = [row(gap, seconds=10.0**k) for k, gap in enumerate(gaps)]
    task = SimpleNamespace(quantity="h - h*", unit="")
    drawn = bench_report.curves(task, {rows[0].key: rows}, "seconds")
    heights = drawn.axes[0].lines[0].get_ydata()
    assert np.isfinite(heights).all() and heights[-1] == pytest.approx(1e-16)
