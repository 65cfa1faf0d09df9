"""A tree's differentiable leaves: floats are, integers and PRNG keys are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from bilevel_flax.base import PyTree


class Split(NamedTuple):
    """A tree's differentiable leaves, and the way back."""

    leaves: list[jax.Array]
    merge: Callable[[list[jax.Array]], PyTree]  # the other leaves as they were
    complete: Callable[[list[jax.Array]], PyTree]  # the other leaves as zeros


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is differentiated: floats are, integers and PRNG keys are not."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split(tree: PyTree) -> Split:
    """The float leaves of a tree, and the two ways to put others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

    def rebuild(new, others):
        out = list(others)
        for i, leaf in zip(chosen, new, strict=True):
            out[i] = leaf
        return treedef.unflatten(out)

    def complete(new):
        return rebuild(new, [None if is_inexact(x) else jnp.zeros_like(x) for x in leaves])

    return Split([leaves[i] for i in chosen], lambda new: rebuild(new, leaves), complete)


def uses(function: Callable, *args: Any) -> list[bool]:
    """For each leaf of the arguments, whether the function's result can depend on it."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(used)
