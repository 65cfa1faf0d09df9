"""Configs: overrides of every type, calls resolved, mistakes named with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections
import optax
import pytest

from bilevel_flax.solvers import table
from bilevel_flax.train import config as configs
from bilevel_flax.train.config import ConfigError

ROOT = Path(__file__).parents[2]
HYPERCLEANING = str(ROOT / "configs" / "mnist_hypercleaning.py")

SOURCE = """
import ml_collections
from ml_collections import config_dict

def get_config(arg="default"):
    config = ml_collections.ConfigDict()
    config.arg = arg
    config.steps = 100
    config.rate = 0.5
    config.flag = True
    config.name = "x"
    config.sizes = (1, 2)
    config.maybe_flag = config_dict.placeholder(bool)
    config.maybe_rate = config_dict.placeholder(float)
    config.maybe_name = config_dict.placeholder(str)
    config.maybe_sizes = config_dict.placeholder(tuple)
    config.inner = {
        "call": "optax:sgd",
        "learning_rate": {
            "call": "optax:linear_schedule",
            "init_value": 1.0,
            "end_value": 0.0,
            "transition_steps": config.get_oneway_ref("steps"),
        },
    }
    return config
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "task.py").write_text(SOURCE)
    return str(folder / "task.py")


def at(config: ml_collections.ConfigDict, name: str) -> Any:
    for key in name.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=7", 7),
        ("steps=1_000", 1000),
        ("rate=1", 1.0),
        ("rate=1e-3", 1e-3),
        ("flag=false", False),
        ("flag=False", False),
        ("flag=0", False),
        ("name=a=b", "a=b"),
        ("name=None", "None"),
        ("name=3", "3"),
        ("sizes=3,4,5", (3, 4, 5)),
        ("sizes=[3, 4]", (3, 4)),
        ("sizes=3", (3,)),
        ("maybe_flag=true", True),
        ("maybe_flag=None", None),
        ("maybe_rate=2", 2.0),
        ("maybe_rate=None", None),
        ("maybe_name=some/folder", "some/folder"),
        ("maybe_sizes=(1, 2, 3)", (1, 2, 3)),
        ("maybe_sizes=None", None),
        ("inner.learning_rate.init_value=3", 3.0),
        ("inner.call=optax:adam", "optax:adam"),
        ("inner.momentum=0.9", 0.9),
        ("inner.nesterov=true", True),
    ],
)
def test_an_override_is_read_as_its_keys_type(spec: str, override: str, value: Any):
    config = configs.load(spec, [override])
    found = at(config, override.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=7", '--config.stpes: the config has no such key (did you mean "steps"?)'),
        ("inner.learning_rat.init_value=1", "the config has no such key"),
        ("inner.init_valu=1", 'did you mean "inner.learning_rate.init_value"?'),
        ("inner.momentun=1", 'did you mean "inner.momentum"?'),
        ("inner=1", "--config.inner: it has several keys, set one: inner.call, "),
        ("steps", "--config.steps: write --config.steps=VALUE"),
        ("steps=3e3", "--config.steps=3e3: expected int, such as 100"),
        ("steps=None", "--config.steps=None: expected int, such as 100"),
        ("steps=", "--config.steps=: expected int, such as 100"),
        ("rate=fast", "--config.rate=fast: expected float, such as 0.5"),
        ("flag=maybe", "--config.flag=maybe: expected bool, such as True"),
        ("maybe_flag=maybe", "--config.maybe_flag=maybe: expected bool"),
        ("maybe_rate=x", "--config.maybe_rate=x: expected float"),
        ("inner.nesterov=perhaps", "--config.inner.nesterov=perhaps: expected bool"),
        (".steps=3", "the config has no such key"),
        ("=3", "the config has no such key"),
    ],
)
def test_a_bad_override_names_the_key_and_the_way_out(spec: str, override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        configs.load(spec, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_refers_to_a_key_follows_it_and_not_the_other_way(spec: str):
    config = configs.load(spec, ["steps=7"])
    assert config.inner.learning_rate.transition_steps == 7
    config = configs.load(spec, ["inner.learning_rate.transition_steps=9"])
    assert config.inner.learning_rate.transition_steps == 9
    assert config.steps == 100


def test_the_argument_reaches_get_config(spec: str):
    assert configs.load(spec).arg == "default"
    assert configs.load(f"{spec}:other").arg == "other"


def test_a_mistyped_file_is_answered_with_the_nearest(spec: str):
    with pytest.raises(ConfigError, match="task.py"):
        configs.load(spec.replace("task.py", "tsak.py"))
    with pytest.raises(ConfigError, match="no file"):
        configs.load("nowhere/at/all.py")


@pytest.mark.parametrize(
    ("source", "spec_end", "message"),
    [
        ("x = 1", "", "defines no get_config()"),
        ("def get_config():\n    return {}", ":soba", "takes no argument, leave out :soba"),
    ],
)
def test_a_config_file_must_give_a_config(tmp_path: Path, source: str, spec_end: str, message: str):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(ConfigError) as caught:
        configs.load(f"{path}{spec_end}")
    assert message in str(caught.value)


def test_calls_are_made_from_the_inside_out(spec: str):
    config = configs.load(spec, ["inner.learning_rate.init_value=0.5", "inner.momentum=0.9"])
    transform = configs.resolve(config.inner)
    assert isinstance(transform, optax.GradientTransformation)
    schedule = configs.resolve(config.inner.learning_rate)
    assert float(schedule(50)) == pytest.approx(0.25)


def test_only_accepted_arguments_are_handed_over():
    found = configs.resolve({"call": "fractions:Fraction", "numerator": 3}, denominator=4, other=5)
    assert found * 4 == 3


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"call": "optax:sgdd", "learning_rate": 0.1}, 'did you mean "sgd"?'),
        ({"call": "optaxx:sgd"}, "No module named 'optaxx'"),
        ({"call": "optax"}, 'write "package.module:attribute"'),
        ({"call": ":sgd"}, 'write "package.module:attribute"'),
        ({"call": ""}, 'write "package.module:attribute"'),
        ({"call": "optax:sgd"}, "missing a required argument: 'learning_rate'"),
        (
            {"call": "optax:sgd", "learning_rate": -0.1},
            "optax:sgd: learning_rate=-0.1 must be >= 0",
        ),
        (
            {"call": "optax:sgd", "learning_rat": 0.1},
            "optax:sgd takes no argument 'learning_rat' (did you mean",
        ),
        ({"call": "math:pi"}, "cannot be called"),
    ],
)
def test_a_call_that_cannot_be_made_says_why(node: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        configs.resolve(node)
    assert message in str(caught.value)


@pytest.mark.parametrize("solver", ["soba", "saba", "srba", "spaba", "masoba", "storm", "fsla"])
def test_every_solver_of_the_hypercleaning_config_is_there(solver: str):
    config = configs.load(f"{HYPERCLEANING}:{solver}")
    assert callable(configs.imported(config.solver.call))
    assert configs.imported(config.solver.call).__name__ == solver
    assert configs.plain(config)["solver"]["call"] == table.qualified_name(solver)


def test_an_unknown_solver_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "soba"'):
        configs.load(f"{HYPERCLEANING}:sobba")
