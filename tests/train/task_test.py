"""A task of one's own: what may be left out, and what old names still mean."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_task

from bilevel_flax.checks import UserError
from bilevel_flax.train import task
from bilevel_flax.train.experiment import train_and_evaluate
from bilevel_flax.train.metrics.scalars import as_scalars
from bilevel_flax.train.task import InitialValues, Task


def bare_task(config: Any) -> Task:
    """A problem, a start and data: nothing to evaluate, nothing to report."""
    whole = tiny_task.make_task(config)
    return Task(whole.problem, whole.init, whole.inner, whole.outer)


def bare_config(**more: Any) -> Any:
    """Only what has no default: everything else is the schema's."""
    sgd = {"call": "optax:sgd", "learning_rate": 0.1}
    solver = {"call": "bilevel_flax:soba", "inner": sgd, "outer": sgd}
    config = tiny_task.ml_collections.ConfigDict({"steps": 7, "solver": solver})
    config.task = {"call": "task_test:bare_task"}
    config.update(more)
    return config


def test_the_least_that_a_task_and_a_config_can_be(tmp_path: Path):
    summary = train_and_evaluate(bare_config(), tmp_path)
    assert (summary["steps"], summary["selected_step"]) == (7, 7)
    assert (tmp_path / "report.html").exists()


def unnamed_metric(config: Any) -> Task:
    return dataclasses.replace(bare_task(config), best_metric="accuracy")


def test_a_best_metric_that_nobody_evaluates_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="best_metric='accuracy' is none of what evaluate returns"):
        train_and_evaluate(bare_config(task={"call": "task_test:unnamed_metric"}), tmp_path)


def test_old_names_work_with_a_warning():
    whole = tiny_task.make_task(tiny_task.get_config(seed=0))
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    old = {k: v for k, v in fields.items() if k not in ("final_metrics", "best_metric")}
    with pytest.warns(DeprecationWarning) as warned:
        made = Task(**old, finish=fields["final_metrics"], select=fields["best_metric"])  # pyright: ignore
    assert made == whole
    assert [str(w.message).split(";")[0] for w in warned] == [
        "Task(finish=) is now final_metrics=",
        "Task(select=) is now best_metric=",
    ]
    with pytest.warns(DeprecationWarning, match="Start is now .*InitialValues"):
        assert task.Start is InitialValues  # pyright: ignore


def test_a_unit_is_a_text():
    whole = tiny_task.make_task(tiny_task.get_config(seed=0))
    with pytest.raises(UserError, match=r"units: 'distance' has the unit 0.01"):
        dataclasses.replace(whole, units={"distance": 0.01})


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "arrays": ({"inner": {"a": [1.0]}}, r"inner of the task is a dict.*bf.data.partition\("),
    "no outer data": ({"outer": None}, "outer of the task is a NoneType"),
    "a list held out": ({"held_out": [1]}, "held_out of the task is a list"),
    "init of nothing": ({"init": lambda: 0}, r"init of the task is called as init\(rng\), but"),
    "evaluate on data": ({"evaluate": lambda s, d: {}}, r"called as evaluate\(state\).*'d'"),
    "a value": ({"evaluate": 0.5}, r"evaluate of the task is 0.5; give a function"),
    "one argument": (
        {"final_metrics": lambda state: {}},
        r"called as final_metrics\(state, workdir, log\)",
    ),
    "a name": ({"headline": "loss"}, "headline='loss' must be a list of names"),
    "a list of units": ({"units": ["loss"]}, r"units=\['loss'\] must be a dict"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_task_is_one_line(name: str):
    given, words = MISTAKES[name]
    whole = tiny_task.make_task(tiny_task.get_config(seed=0))
    with pytest.raises(UserError, match=words) as error:
        dataclasses.replace(whole, **given)
    assert "\n" not in str(error.value)


def test_what_a_task_returns_is_checked():
    whole = tiny_task.make_task(tiny_task.get_config(seed=0))
    task = dataclasses.replace(whole, init=lambda rng: (1.0, 2.0))
    with pytest.raises(UserError, match=r"init .* returned a tuple; return InitialValues\("):
        task.start(jax.random.key(0))
    for found, words in (
        (None, "final_metrics returned None; return a dict"),
        ({"a": {"b": object()}}, r"final_metrics\['a'\]\['b'\] is no value of JSON \(object\)"),
    ):
        task = dataclasses.replace(whole, final_metrics=lambda *_, found=found: found)
        with pytest.raises(UserError, match=words):
            task.conclusion(None, Path(), print)  # pyright: ignore[reportArgumentType]
    values = {"a": np.arange(2), "b": jnp.float32(0.5), "c": [np.int64(3), "x"], "d": {4: None}}
    task = dataclasses.replace(whole, final_metrics=lambda *_: values)
    found = task.conclusion(None, Path(), print)  # pyright: ignore[reportArgumentType]
    assert found == {"a": [0, 1], "b": 0.5, "c": [3, "x"], "d": {"4": None}}


def test_a_metric_does_not_take_the_name_of_one_of_the_run():
    with pytest.raises(ValueError, match="a metric has the name 'inner_loss'"):
        as_scalars({"inner_loss": 1.0})
