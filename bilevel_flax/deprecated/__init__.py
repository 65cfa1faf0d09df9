"""Old names of modules and functions: found for one release, with a warning that tells the new.

Nothing in here is imported until somebody asks for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

from bilevel_flax.deprecated.attributes import ATTRIBUTES
from bilevel_flax.deprecated.modules import MODULES

_F = TypeVar("_F", bound=Callable[..., Any])
_GONE_IN = "0.3"


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the old name goes in {_GONE_IN}", DeprecationWarning, stacklevel=3
    )


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module that has moved under its old name: one module object, two names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MODULES[spec.name]
        _warn(spec.name, new)
        return _Alias(spec.name, importlib.import_module(new))

    def exec_module(self, module: ModuleType) -> None:
        del module


class _Alias(ModuleType):
    """Hands every look-up, and what a test may patch, on to the module where it is now."""

    def __init__(self, name: str, target: ModuleType):
        super().__init__(name, target.__doc__)
        self.__dict__["_target"] = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(self.__dict__["_target"], name, value)


def find_old_modules() -> None:
    """Lets `import bilevel_flax.OLD` find what has moved."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def renamed(old: str, owner: Any, new: str) -> Any:
    """An attribute of `owner` that was asked for by its old name."""
    _warn(old, new)
    return getattr(owner, new)


def renamed_arguments(**new_names: str) -> Callable[[_F], _F]:
    """Lets a function take arguments by their old names too, one release long.

    Args:
        **new_names: `old="new"`; the decorated function has them as its `old_arguments`.
    """

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in new_names.items():
                if old in kwargs:
                    _warn(f"{function.__qualname__.removesuffix('.__init__')}({old}=)", f"{new}=")
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        wrapper.old_arguments = new_names  # pyright: ignore[reportAttributeAccessIssue]
        return wrapper  # pyright: ignore[reportReturnType]

    return decorate


def names(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for `module` that finds the names which have left it."""

    def find(name: str) -> Any:
        old = f"{module}.{name}"
        if old in ATTRIBUTES:
            place, _, attribute = ATTRIBUTES[old].partition(":")
            _warn(old, f"{place}.{attribute}")
            return getattr(importlib.import_module(place), attribute)
        if old in MODULES:
            return importlib.import_module(old)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


def wrap_old_settings(problem: Any, remat: Any, microbatches: Any, compute_dtype: Any) -> None:
    """Puts the wrappers around a new problem's losses that these arguments of it stood for."""
    if not remat and microbatches == 1 and microbatches is not True and compute_dtype is None:
        return
    _warn(
        "Problem(remat=, microbatches=, compute_dtype=)",
        "a wrapper: bf.oracles.remat(problem), microbatched(problem, parts) and "
        "mixed_precision(problem, dtype)",
    )
    settings = {"remat": remat, "microbatches": microbatches, "compute_dtype": compute_dtype}
    wrappers = importlib.import_module("bilevel_flax.oracles.wrappers")
    wrapped = wrappers.configured(problem, settings)
    for name in ("inner_loss", "outer_loss"):
        object.__setattr__(problem, name, getattr(wrapped, name))
