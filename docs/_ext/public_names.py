"""What is public, namespace by namespace, and what the docstring of a public name must have."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any, NamedTuple

PACKAGE = "bilevel_flax"
# Page by page, in the order of the site. A name that two namespaces export is on the first's page.
NAMESPACES = (
    "bilevel_flax",
    "bilevel_flax.solvers",
    "bilevel_flax.solvers.adjoint_optimisers",
    "bilevel_flax.contrib",
    "bilevel_flax.outer",
    "bilevel_flax.outer.sample_weights",
    "bilevel_flax.outer.augmentation",
    "bilevel_flax.outer.architecture",
    "bilevel_flax.oracles",
    "bilevel_flax.data",
    "bilevel_flax.nnx",
    "bilevel_flax.sharding",
    "bilevel_flax.checkpoints",
    "bilevel_flax.diagnostics",
    "bilevel_flax.recipes",
    "bilevel_flax.trainers",
    "bilevel_flax.base",
)
# Of the harness, what the pages tell a user to call; the rest is the command line's.
HARNESS = (
    "train.experiment.train_and_evaluate",
    "train.task.Task",
    "train.task.InitialValues",
    "train.config.OpenMapping",
    "train.multihost.start",
    "train.multihost.Channel",
    "train.multihost.check_same",
    "train.mixture.load",
    "train.mixture.export",
    "train.mixture.Options",
    "plan.collectives",
)


class Public(NamedTuple):
    """A public name: the module that exports it, the name, and what it stands for."""

    module: str
    name: str
    value: Any

    @property
    def path(self) -> str:
        """As a user writes it."""
        return f"{self.module}.{self.name}"

    @property
    def is_constant(self) -> bool:
        """Whether it is neither a function nor a class of ours: its `__doc__` is its type's."""
        home = getattr(self.value, "__module__", None) or ""
        return not (callable(self.value) and home.startswith(PACKAGE))


def exported(namespace: str) -> list[Public]:
    """The names of a namespace: its `__all__`, or what it defines without an underscore."""
    module = importlib.import_module(namespace)
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == namespace
    ]
    return [Public(namespace, name, getattr(module, name)) for name in names]


def pages() -> dict[str, list[Public]]:
    """The names of every page; each where it is found first, modules on pages of their own."""
    there: set[int] = set()
    result = {}
    for namespace in NAMESPACES:
        names = [
            public
            for public in exported(namespace)
            if not isinstance(public.value, types.ModuleType) and id(public.value) not in there
        ]
        there |= {id(public.value) for public in names if not public.is_constant}
        result[namespace] = names
    harness = []
    for path in HARNESS:
        module, _, name = f"{PACKAGE}.{path}".rpartition(".")
        harness.append(Public(module, name, getattr(importlib.import_module(module), name)))
    return {**result, f"{PACKAGE}.train": harness}


def unlisted() -> list[str]:
    """Public modules that no page is about."""
    return [
        public.path
        for namespace in NAMESPACES
        for public in exported(namespace)
        if isinstance(public.value, types.ModuleType) and public.value.__name__ not in NAMESPACES
    ]


def faults() -> list[str]:
    """One line for each public name that a reader would look for in vain, or find no example of."""
    found = [f"{path}: a public module without a page" for path in unlisted()]
    for namespace, names in pages().items():
        text = inspect.getdoc(importlib.import_module(namespace)) or ""
        if not text:
            found.append(f"{namespace}: no docstring")
        for public in names:
            docstring = public.value.__doc__ or ""
            if public.is_constant:
                if f"`{public.name}`" not in text:
                    found.append(f"{public.path}: its module's docstring does not say what it is")
            elif not docstring:
                found.append(f"{public.path}: no docstring")
            elif ">>>" not in docstring:
                found.append(f"{public.path}: no example")
    return found
