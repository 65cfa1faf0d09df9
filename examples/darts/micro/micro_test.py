"""The micro-space: what is the same network, what a genotype is worth, what a search costs."""

import csv
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import bench, contrib
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.train import workdir as workdirs
from bilevel_flax.train.config import ConfigError, load, plain
from examples.darts.micro import bench as darts_bench
from examples.darts.micro import data as micro_data
from examples.darts.micro import methods as micro_methods
from examples.darts.micro import run as micro_run
from examples.darts.micro import scores as micro_scores
from examples.darts.micro import search as searching
from examples.darts.micro import table as tables
from examples.darts.micro.network import MicroNetwork
from examples.darts.micro.space import OPERATIONS, canonical, distinct, genotypes, paths

NONE, SKIP, CONV1, CONV3, POOL = OPERATIONS


def digits(count=64):
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % 10
    return micro_data.Digits(rng.normal(size=(count, 14, 14, 1)).astype(np.float32), labels)


def numbers(genotype):
    return jnp.array([OPERATIONS.index(name) for name in genotype], jnp.int32)


@pytest.fixture(scope="module")
def network():
    module = MicroNetwork(channels=4)
    images = jnp.asarray(digits(12).image)
    variables = module.init(jax.random.key(0), images, numbers([CONV3] * 4), train=True)
    apply = jax.jit(
        lambda params, choices: module.apply(
            {**variables, "params": params}, images, choices, train=True, mutable=["batch_stats"]
        )[0]
    )
    return apply, variables["params"]


def test_there_are_625_networks_and_195_that_differ():
    assert len(set(genotypes())) == 625
    assert len(distinct()) == len({canonical(genotype) for genotype in genotypes()}) == 195
    assert all(canonical(canonical(genotype)) == canonical(genotype) for genotype in genotypes())
    assert [tables.number(genotype) for genotype in genotypes()] == list(range(625))


def places(genotype):
    """(edge, operation) of all that has parameters, path by path in the order of the paths."""
    row = [(edge, genotype[edge]) for edge in range(3)] if paths(genotype)[0] is not None else []
    both = [row, [(3, genotype[3])]]
    both.sort(key=lambda path: repr(_content(path)))
    return [place for path in both for place in path if place[1] in (CONV1, CONV3)]


def _content(path):
    names = [name for _, name in path]
    return None if not names or NONE in names else tuple(n for n in names if n != SKIP)


def test_networks_under_one_name_are_the_same_function(network):
    """The parameters of the one, moved to the edges of the other, give the same logits."""
    apply, params = network
    groups = {}
    for genotype in genotypes():
        groups.setdefault(canonical(genotype), []).append(genotype)
    chosen = [group for group in groups.values() if len(group) > 1]
    assert len(chosen) > 50
    for first, *others in chosen[::3]:
        expected = apply(params, numbers(first))
        for other in others[:: max(1, len(others) // 2)]:
            moved = dict(params)
            for source, target in zip(places(first), places(other), strict=True):
                kernel = params[f"edge_{source[0]}"][f"operations_{OPERATIONS.index(source[1])}"]
                name = f"edge_{target[0]}"
                moved[name] = {
                    **moved[name],
                    f"operations_{OPERATIONS.index(target[1])}": kernel,
                }
            np.testing.assert_allclose(apply(moved, numbers(other)), expected, atol=2e-5)


def test_networks_under_different_names_are_different_functions(network):
    """But for two: a sum of twice the same, which the normalisation after it undoes."""
    apply, params = network
    twice = [(SKIP,) * 4, (POOL, SKIP, SKIP, POOL)]
    doubled = {canonical(genotype) for genotype in twice}
    chosen = [genotype for genotype in distinct() if genotype not in doubled]
    assert len(chosen) == 193
    found = [np.asarray(apply(params, numbers(genotype))) for genotype in chosen]
    gaps = [abs(a - b).max() for a, b in itertools.combinations(found, 2)]
    assert min(gaps) > 1e-3


def test_a_mixture_of_one_operation_is_that_network(network):
    apply, params = network
    genotype = (CONV3, POOL, CONV1, SKIP)
    mixed = apply(params, jnp.asarray(searching.one_hot(genotype)))
    np.testing.assert_allclose(mixed, apply(params, numbers(genotype)), atol=1e-5)


# What a genotype is worth.


def test_regret_and_rank_of_a_toy_table():
    table = np.zeros((625, 2))
    best, good, tied = (CONV3,) * 4, (CONV3, CONV3, CONV1, CONV3), (CONV1,) * 4
    table[:] = 0.5
    table[tables.number(best)] = (0.9, 0.8)
    table[tables.number(good)] = (0.8, 0.8)
    assert micro_scores.score(best, table)[:3] == pytest.approx((0.85, 0.0, 0.0))
    assert micro_scores.score(good, table)[:3] == pytest.approx((0.8, 0.05, 1 / 624))
    # 623 share the last place; nobody but two is better.
    assert micro_scores.score(tied, table)[:3] == pytest.approx((0.5, 0.35, 2 / 624))
    table[0, 1] = np.nan
    with pytest.raises(ValueError, match="lacks 1 of 1250 accuracies"):
        micro_scores.score(best, table)


@pytest.mark.parametrize(
    ("genotype", "expected"),
    [
        ((SKIP,) * 4, True),
        ((SKIP, POOL, SKIP, CONV3), True),
        ((CONV3, CONV3, NONE, SKIP), True),  # both convolutions are dead
        ((CONV3, SKIP, CONV1, SKIP), False),
        ((CONV3, SKIP, SKIP, CONV1), False),
    ],
)
def test_collapsed_is_at_most_one_live_convolution(genotype, expected):
    assert micro_scores.collapsed(genotype) is expected


def test_the_committed_table():
    """Complete, and the same for all names of a network."""
    table = tables.read()
    assert table.shape == (625, 3) and not np.isnan(table).any()
    assert ((table > 0.05) & (table < 1)).all()
    for genotype in genotypes():
        same = tables.number(canonical(genotype))
        np.testing.assert_array_equal(table[tables.number(genotype)], table[same])
    assert 0.8 < micro_scores.rank_ceiling(table) <= 1


def test_a_table_is_resumed(tmp_path):
    path, calls = tmp_path / "table.csv", []

    def trainer(genotype, seed):
        if len(calls) == 40:
            raise KeyboardInterrupt
        calls.append((genotype, seed))
        return 0.25 + 0.5 * (genotype == (CONV3,) * 4)

    with pytest.raises(KeyboardInterrupt):
        tables.complete(trainer, path, lambda line: None)
    assert np.sum(~np.isnan(tables.read(path)).all(1)) >= 40
    calls.clear()
    done = tables.complete(
        lambda genotype, seed: calls.append((genotype, seed)) or 0.5, path, lambda line: None
    )
    assert len(calls) == 3 * 195 - 40 and not np.isnan(done).any()
    np.testing.assert_array_equal(tables.read(path), done)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of the micro-space"):
        tables.read(path)


# What a search costs.


def small_search(batch_size=16):
    names = (SKIP, CONV3)
    return searching.make_search(
        0, digits(), MicroNetwork(names=names, channels=2), batch_size=batch_size
    )


def flops(solver, search):
    """Of the step's HLO as it is handed to the compiler.

    XLA's CPU backend gives products of matrices to a library, and counts them as nothing then.
    """
    state = jax.eval_shape(lambda key: solver.init(*search.init(key)), jax.random.key(0))
    pick = lambda side: jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), side.batches)
    lowered = jax.jit(solver.update).lower(state, bf.Batch(pick(search.inner), pick(search.outer)))
    costs: Any = lowered.cost_analysis()
    return costs["flops"]


def steps_over_plain(names, channels, *solvers):
    """FLOPs of a step in those of plain training of the supernet."""
    search = searching.make_search(0, digits(128), MicroNetwork(names, channels), batch_size=64)
    plain_step = flops(inner_only(search.problem, inner=optax.sgd(0.1)), search)
    return [
        flops(solver(search.problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1)), search)
        / plain_step
        for solver in solvers
    ]


def test_a_search_step_costs_at_most_four_gradients():
    soba, first, second = steps_over_plain(OPERATIONS, 8, bf.soba, contrib.darts1, contrib.darts2)
    assert 2 < soba <= 4.05 and first <= 2.05
    # The unrolled step is checkpointed, so that most of one gradient is computed twice.
    assert second <= 5.05


def check_searches(method, budget, units, monkeypatch):
    traces = []

    def make_solver(problem, *args):
        def inner_loss(*point):
            traces.append(point)
            return problem.inner_loss(*point)

        return made(bf.Problem(inner_loss, problem.outer_loss), *args)

    made = micro_methods.make_solver
    monkeypatch.setattr(micro_methods, "make_solver", make_solver)
    search = small_search()
    searcher = micro_run.Searcher(method, budget=budget)
    results = [searcher(search, 0)]
    once = len(traces)
    results += [searcher(search, seed) for seed in (1, 0)]
    assert len(traces) == once
    assert searcher.steps == budget / micro_methods.UNITS[method]
    assert results[0].oracle_units == units
    assert set(results[0].genotype) <= {SKIP, CONV3}
    assert not np.array_equal(results[0].weights, results[1].weights)
    np.testing.assert_array_equal(results[2].weights, results[0].weights)


def test_one_trace_for_all_searches(monkeypatch):
    check_searches("darts1", 40, 40, monkeypatch)


@pytest.mark.slow
def test_full_passes_are_counted(monkeypatch):
    # 2 minibatches on each side
    check_searches("srba", 48, 4 * 8 + 2 * (3 + 1), monkeypatch)


def test_all_methods_have_the_same_budget():
    for method in micro_methods.METHODS:
        steps = micro_methods.steps_of(method)
        assert 0 <= micro_methods.BUDGET - steps * micro_methods.UNITS[method] < 12
    assert micro_methods.BUDGET <= 2 * micro_methods.PLAIN_STEPS
    problem = small_search().problem
    for method, units in micro_methods.UNITS.items():
        passes = 4 if method == "srba" else 0
        assert micro_methods.make_solver(problem, method, 10, 4, 4).units + passes == units


# The bench.


@pytest.fixture
def fake(monkeypatch):
    """Searches that take no time: what they find depends on method and seed."""
    calls = []

    class Fake:
        def __init__(self, method):
            self.method = method

        def __call__(self, search, seed):
            calls.append((self.method, seed))
            genotype = (CONV3,) * 4 if self.method == "soba" else (SKIP,) * 4
            return micro_run.Result(genotype, np.zeros((4, 5)), 1000.0, 1.5)

    table = np.full((625, 3), 0.5)
    table[tables.number((CONV3,) * 4)] = 0.9
    table[0] += (0.1, -0.1, 0.0)
    monkeypatch.setattr(darts_bench, "Searcher", Fake)
    monkeypatch.setattr(darts_bench, "make_search", lambda seed: None)
    monkeypatch.setattr(tables, "read", lambda: table)
    return calls


def test_the_bench_writes_its_columns_and_resumes(fake, tmp_path):
    options = {"task": "darts_micro", "out": tmp_path / "out"}
    bench.run(bench.Options(solvers=("soba",), seeds=2, **options), lambda line: None)
    rows = bench.run(bench.Options(solvers=("soba", "darts1"), **options), lambda line: None)
    assert fake == [("soba", seed) for seed in range(10)] + [("darts1", k) for k in range(10)]
    assert len(rows) == 20
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [
        "solver",
        "seed",
        "regret",
        "rank_percentile",
        "collapsed",
        "oracle_units",
        "seconds",
    ]
    assert [float(line["regret"]) for line in lines] == [0.0] * 10 + [pytest.approx(0.4)] * 10
    assert [line["collapsed"] for line in lines] == ["False"] * 10 + ["True"] * 10
    assert "soba" in (tmp_path / "out" / "bench.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solvers": ("sobaa",)}, "'sobaa' is unknown.*did you mean|'sobaa' is unknown"),
        ({"solvers": ()}, "--solvers is empty"),
        ({"solvers": ("soba", "soba")}, "twice"),
        ({"grid": 9}, "--grid: darts_micro"),
        ({"seconds": 5.0}, "--seconds: darts_micro"),
        ({"seeds": 0}, "--seeds=0: give 1 or more"),
    ],
)
def test_mistakes_on_the_bench_are_named(fake, tmp_path, changes, message):
    options = {"task": "darts_micro", "solvers": ("soba",), "out": tmp_path} | changes
    with pytest.raises(ConfigError, match=message):
        bench.run(bench.Options(**options), lambda line: None)


def test_the_bench_has_methods_of_its_own(fake, tmp_path):
    bench.run(bench.Options("darts_micro", None, tmp_path / "out", seeds=1), lambda line: None)
    with (tmp_path / "out" / "results.csv").open() as file:
        assert [row["solver"] for row in csv.DictReader(file)] == ["soba", "darts1", "darts2"]


def test_a_search_is_not_resumed_in_another_space(tmp_path):
    record = plain(load("configs/darts_micro.py"))
    for name, content in (("config.json", record), ("summary.json", {})):
        (tmp_path / name).write_text(json.dumps(content))
    workdirs.check_same_run(tmp_path, record)
    other = plain(
        load("configs/darts_micro.py", ["space.operations=('skip_connect','nor_conv_3x3')"])
    )
    with pytest.raises(ConfigError, match=r"another config \(space.operations: saved .*none"):
        workdirs.check_same_run(tmp_path, other)
