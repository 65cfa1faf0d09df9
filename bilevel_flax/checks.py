"""Checks of a user's problem at trace time: they cost nothing in the compiled step."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from bilevel_flax import rows
from bilevel_flax.base import Batch, Problem, PyTree, Table, Variables
from bilevel_flax.oracles import is_inexact


def copied(tree: PyTree) -> PyTree:
    """A copy of every leaf as a strongly typed array, so that no two leaves share a buffer.

    Tables are taken as they are: whoever makes one makes a new one, and two would not fit.
    """

    def copy(node):
        if isinstance(node, Table):
            return node
        return jnp.array(node, jnp.result_type(node), copy=True)

    return jax.tree.map(copy, tree, is_leaf=lambda node: isinstance(node, Table))


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


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises unless `value` is an integer >= `least`.

    Raises:
        ValueError: names the argument and the value.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raises unless `value` is a schedule or a positive finite number.

    Raises:
        ValueError: names the argument and the value.
    """
    if callable(value):
        return
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a positive number or a schedule, got {value!r}")


def check_partition(count_name: str, count: Any, weights_name: str, weights: Any) -> None:
    """Raises unless there is a positive number of minibatches and a weight for each.

    Raises:
        ValueError: names the arguments and their values.
    """
    check_count(count_name, count)
    if weights is not None and np.shape(weights) != (count,):
        raise ValueError(
            f"{weights_name} has shape {np.shape(weights)}, but {count_name} is {count}: "
            "pass one share for each minibatch (FiniteSum.weights)"
        )


def warn_unless_finite_sum(problem: Problem, name: str) -> None:
    """Warns that a stateful loss is no sum of fixed terms, which variance reduction relies on."""
    if problem.stateful:
        warnings.warn(
            f"{name} compares visits of the same minibatch. The rng key is fixed for each "
            "minibatch id, so dropout and augmentation repeat themselves; BatchNorm's running "
            "statistics still change between visits, which leaves noise that it cannot remove",
            stacklevel=3,
        )
