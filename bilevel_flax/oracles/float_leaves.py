"""Functions of lists of arrays in which integers, which have no derivatives, lie among floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bilevel_flax.tree import is_inexact


def floats(leaves: Sequence) -> list:
    """The arrays that are differentiated."""
    return [leaf for leaf in leaves if is_inexact(leaf)]


def of_floats(function: Callable[..., Any], leaves: Sequence) -> Callable[..., Any]:
    """`function` of its float arguments alone; the others are those of `leaves`."""

    def moving(*values):
        rest = iter(values)
        return function(*(next(rest) if is_inexact(leaf) else leaf for leaf in leaves))

    return moving


def with_floats(function: Callable[..., list]) -> Callable[..., tuple[list, list]]:
    """`function` as `(its float outputs, all of them)`: what is differentiated, and the rest."""

    def both(*leaves):
        outs = list(function(*leaves))
        return floats(outs), outs

    return both
