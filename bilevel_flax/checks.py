"""Checks of a user's problem at trace time: they cost nothing in the compiled step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from bilevel_flax import rows
from bilevel_flax.base import Batch, Problem, PyTree, Variables
from bilevel_flax.oracles import is_inexact


def copied(tree: PyTree) -> PyTree:
    """A copy of every leaf as a strongly typed array, so that no two leaves share a buffer."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf), copy=True), tree)


def parameters(name: str, tree: PyTree) -> None:
    """Raises unless `tree` has at least one floating-point leaf and only arrays.

    Raises:
        TypeError: a leaf is no array.
        ValueError: nothing in it can be learned.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, (jax.Array, float, int)) and not hasattr(leaf, "__array__"):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; "
                "parameters are pytrees of arrays"
            )
    if not any(is_inexact(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} has no floating-point leaf, so there is nothing to learn: {tree!r:.80}"
        )


def per_sample(problem: Problem, outer_params: PyTree) -> None:
    """Raises unless every per-sample leaf is a float array [n, ...].

    Raises:
        ValueError: the mask does not fit `outer_params`, or a leaf has no leading axis.
    """

    def check(leaf):
        if jnp.ndim(leaf) < 1 or not is_inexact(leaf):
            raise ValueError(
                "a per-sample leaf of outer_params must be a float array [n, ...] with one row "
                f"for each training example, got {jnp.result_type(leaf)}{jnp.shape(leaf)}"
            )

    rows.map_prefix(problem.per_sample, check, lambda leaf: None, outer_params)


def outer_is_used(
    problem: Problem, variables: Variables, batch: Batch, model_state: PyTree, rng: Any
) -> None:
    """Raises when a leaf of x cannot influence the inner loss.

    Raises:
        ValueError: names the first such leaf.
    """
    z, _, x = variables
    paths = jax.tree.leaves_with_path(x)

    def loss(x):
        seen = rows.gather(problem.per_sample, x, batch.inner)
        extra = (model_state, rng) if problem.stateful else ()
        out = problem.inner_loss(z, seen, batch.inner, *extra)
        return out[0] if isinstance(out, tuple) else out

    jaxpr = jax.make_jaxpr(loss)(x).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    for (path, leaf), alive in zip(paths, used, strict=True):
        if is_inexact(leaf) and not alive:
            raise ValueError(
                f"inner_loss never uses outer_params{jax.tree_util.keystr(path)}, so nothing can "
                "be learned about it: use it in inner_loss or take it out of outer_params"
            )
