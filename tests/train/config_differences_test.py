"""Every essential difference between two configs is named, and nothing else."""

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_flax.train.config import config_differences

values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3))
configs = st.recursive(
    values,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
).map(lambda node: {"root": node})


@settings(max_examples=50, deadline=None)
@given(configs)
def test_a_config_equals_itself_after_json(config: dict):
    assert config_differences(json.loads(json.dumps(config)), config) == []


def test_the_lines():
    saved = {"inner": {"lr": 0.1, "name": "sgd"}, "seed": 0, "old": None}
    now = {"inner": {"lr": 0.2, "name": "sgd"}, "seed": 1, "new": {"a": "x", "b": {}}}
    assert config_differences(saved, now) == [
        "inner.lr: saved 0.1, now 0.2",
        "new.a: saved nothing, now 'x'",
        "new.b: saved nothing, now {}",
        "old: saved None, now nothing",
        "seed: saved 0, now 1",
    ]


def test_harmless_keys_may_differ():
    saved = {"log": {"every": 1, "deep": {"x": 1}}, "keep": 3, "keeper": 1}
    now = {"log": {"every": 2, "deep": {"x": 2}}, "keep": 4, "keeper": 2}
    assert config_differences(saved, now, ["log.*", "keep"]) == ["keeper: saved 1, now 2"]


def test_kinds_of_values():
    assert config_differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    assert config_differences({"a": 1}, {"a": 1.0}) == []
    assert config_differences({"a": math.nan}, {"a": math.nan}) == []
    assert config_differences({"a": 1}, {"a": True}) == ["a: saved 1, now True"]
    assert config_differences({"a": "1"}, {"a": 1}) == ["a: saved '1', now 1"]
    assert config_differences({"a": [1, 2]}, {"a": [2, 1]}) == ["a: saved [1, 2], now [2, 1]"]
    assert config_differences({"a": {"b": 1}}, {"a": 1}) == [
        "a: saved nothing, now 1",
        "a.b: saved 1, now nothing",
    ]
