"""Grid and random search: the budget is matched, diverged runs never win, bad input is named."""

from __future__ import annotations

import math

import pytest

from bilevel_flax.bench.searches import grid_search, random_search


def parabola(spent):
    def evaluate(params, budget):
        spent.append(budget)
        return (params["a"] - 1.0) ** 2 + (params["b"] + 2.0) ** 2

    return evaluate


def test_grid_search_visits_every_point_and_spends_the_budget_evenly():
    spent = []
    found = grid_search(parabola(spent), {"a": [0, 1, 2], "b": [-2, 0]}, 30.0)
    assert found.best.params == {"a": 1, "b": -2} and found.best.value == 0.0
    assert len(found.history) == 6 and sum(spent) == pytest.approx(30.0)
    assert set(spent) == {5.0}
    assert len({tuple(trial.params.values()) for trial in found.history}) == 6


def test_random_search_is_a_function_of_its_seed_and_stays_in_the_space():
    space = {"a": (-3.0, 3.0), "b": lambda rng: float(rng.choice([-2.0, 2.0]))}
    spent = []
    one, again, other = (
        random_search(parabola(spent), space, 8.0, trials=16, seed=seed) for seed in (3, 3, 4)
    )
    assert one == again and one != other
    assert sum(spent) == pytest.approx(3 * 8.0)
    assert all(-3 <= trial.params["a"] <= 3 for trial in one.history)
    assert {trial.params["b"] for trial in one.history} == {-2.0, 2.0}
    assert one.best.value == min(trial.value for trial in one.history)


def test_a_diverged_run_is_kept_but_never_the_best():
    values = {0: math.nan, 1: 5.0, 2: -math.inf, 3: 4.0}
    found = grid_search(lambda params, budget: values[params["a"]], {"a": list(values)}, 1.0)
    assert found.best.params == {"a": 3}
    assert math.isnan(found.history[0].value)
    with pytest.raises(ValueError, match="all 2 trials diverged"):
        grid_search(lambda params, budget: math.inf, {"a": [1, 2]}, 1.0)


def test_evaluate_cannot_change_the_history():
    def evaluate(params, budget):
        params.clear()
        return 0.0

    assert grid_search(evaluate, {"a": [1]}, 1.0).best.params == {"a": 1}


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (lambda f: grid_search(f, {}, 1.0), "grid must give at least one value"),
        (
            lambda f: grid_search(f, {"a": []}, 1.0),
            "grid must give at least one value",
        ),
        (
            lambda f: grid_search(f, {"a": [1]}, 0.0),
            "budget must be a positive finite number",
        ),
        (
            lambda f: grid_search(f, {"a": [1, 2]}, 10.0, min_share=22.0),
            "budget=10 over 2 trials leaves 5 for each, and one step takes 22",
        ),
        (
            lambda f: random_search(f, {"a": (0, 1)}, 1.0, trials=0),
            "trials must be an integer >= 1",
        ),
        (lambda f: random_search(f, {}, 1.0, trials=1), "space is empty"),
        (lambda f: random_search(f, {"a": (1, 1)}, 1.0, trials=1), "low < high"),
    ],
)
def test_bad_arguments_are_named(search, message):
    with pytest.raises(ValueError, match=message):
        search(lambda params, budget: pytest.fail("no run may start"))
