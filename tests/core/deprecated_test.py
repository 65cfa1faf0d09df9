"""Old names lead somewhere, and say where."""

import importlib
import importlib.util

import pytest

from bilevel_flax.deprecated.attributes import ATTRIBUTES
from bilevel_flax.deprecated.modules import MODULES


def place_of(module: str) -> bool:
    """Whether there is such a module; nothing of it is run but its packages."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:  # a package on the way needs an extra
        return not (error.name or "").startswith(("bilevel_flax", "examples", "benchmarks"))


@pytest.mark.parametrize("old", sorted(MODULES))
def test_an_old_module_is_a_new_one(old):
    assert old not in MODULES.values()
    assert place_of(MODULES[old]), f"{old} is said to be {MODULES[old]}"


@pytest.mark.parametrize("old", sorted(ATTRIBUTES))
def test_an_old_name_is_a_new_one(old):
    module, _, name = ATTRIBUTES[old].partition(":")
    assert place_of(module), f"{old} is said to be in {module}"
    if module.startswith("bilevel_flax") and module.split(".")[1] not in ("train", "bench"):
        assert hasattr(importlib.import_module(module), name)


def test_an_old_module_is_imported_with_a_warning():
    with pytest.warns(DeprecationWarning, match="bilevel_flax.rows is now bilevel_flax.per_sample"):
        rows = importlib.import_module("bilevel_flax.rows")
    from bilevel_flax import per_sample

    assert rows.gather is per_sample.gather
