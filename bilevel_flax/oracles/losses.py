"""The user's losses as functions of their differentiable leaves, checked at trace time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Aux, Problem
from bilevel_flax.base.condition import is_condition
from bilevel_flax.minibatches import repeat_real
from bilevel_flax.oracles.loss_errors import explain
from bilevel_flax.tree import depends_on, split


def checked_call(loss: Callable, name: str, stateful: bool, args: tuple, context: tuple):
    """Runs a user's loss; checks what it returns at trace time."""
    name = "condition" if is_condition(loss) else name
    try:
        out = loss(*args, *context) if stateful else loss(*args)
    except Exception as error:
        explained = explain(error, loss, name, stateful, args, context)
        if explained is None:
            raise
        raise explained from error
    if stateful:
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Aux)):
            raise TypeError(
                f"{name} of a stateful Problem must return (loss, bilevel_flax.Aux(model_state, "
                f"metrics)), got {type(out).__name__}"
            )
        value, aux = out
    else:
        if isinstance(out, tuple):
            raise TypeError(
                f"{name} returned a tuple; a loss returns a scalar, or (loss, "
                "bf.Aux(model_state, metrics)) with Problem(stateful=True), or (sum, weight) under "
                "bf.oracles.weighted_sums"
            )
        value, aux = out, Aux()
    if value is None:
        raise TypeError(f"{name} returned None: return the mean over the minibatch")
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(
            f"{name} must return a real scalar, got shape {jnp.shape(value)} "
            f"dtype {jnp.result_type(value)}: take the mean over the minibatch"
        )
    return value, aux


def _next_state(before, after):
    """The mutable state after G, which must have the tree that G was given."""
    if after is None and not jax.tree.leaves(before):
        return before
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            f"inner_loss returned Aux(model_state={_outline(after)}), but was given "
            f"{_outline(before)}: pass solver.init(..., model_state=...) what the network has "
            'beside its parameters, e.g. {"batch_stats": variables["batch_stats"]}, and return it '
            "with the same names"
        )
    return after


def _outline(tree) -> str:
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: ..." for key in tree) + "}"
    return "None" if tree is None else f"a {type(tree).__name__}"


def _arrays(tree):
    """The tree with JAX's arrays for NumPy's, which nothing that is traced could index."""
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, tree)


def inner(problem: Problem, z, x, batch, model_state, rng):
    """G as a function of the differentiable leaves of z and of x's rows -> (loss, aux).

    Returns:
        `(loss, split of z, split of x's rows, way from the rows' gradient to x's)`.
    """
    z_split = split(_arrays(z))
    x_split = split(_arrays(rows.gather(problem.per_sample, x, batch)))
    examples, model_state, rng = _arrays((repeat_real(batch), model_state, rng))

    def loss(z_leaves, x_leaves):
        args = (z_split.merge(z_leaves), x_split.merge(x_leaves), examples)
        context = (model_state, rng)
        value, aux = checked_call(problem.inner_loss, "inner_loss", problem.stateful, args, context)
        return value, aux._replace(model_state=_next_state(model_state, aux.model_state))

    def as_outer(leaves):
        return rows.wrap(problem.per_sample, x_split.complete(leaves), x, batch)

    return loss, z_split, x_split, as_outer


def outer(problem: Problem, z, x, batch, model_state, rng):
    """F as a function of the differentiable leaves of z and of x's shared ones -> (loss, aux).

    Raises:
        ValueError: F uses a per-sample leaf of x.
    """
    z_split = split(_arrays(z))
    x_split, restore = without_rows(problem, x)
    examples, model_state, rng = _arrays((repeat_real(batch), model_state, rng))

    def loss(z_leaves, x_leaves):
        args = (z_split.merge(z_leaves), restore(x_split.merge(x_leaves)), examples)
        context = (model_state, rng)
        return checked_call(problem.outer_loss, "outer_loss", problem.stateful, args, context)

    def by_x(x):
        args = (z, x, batch)
        context = (model_state, rng)
        return checked_call(problem.outer_loss, "outer_loss", problem.stateful, args, context)[0]

    refuse_rows(problem, by_x, x, "outer_loss")
    return loss, z_split, x_split


def without_rows(problem: Problem, x):
    """The leaves of x with no row for each example, split; and the way from them to all of x."""
    shared = rows.map_prefix(problem.per_sample, lambda _: None, lambda leaf: leaf, x)

    def restore(shared):
        return jax.tree.map(
            lambda given, leaf: leaf if given is None else given,
            shared,
            x,
            is_leaf=lambda node: node is None,
        )

    return split(shared), restore


def refuse_rows(problem: Problem, function: Callable, x, name: str) -> None:
    """Raises where `function(x)` depends on a per-sample leaf, which only G is handed rows of.

    Raises:
        ValueError: names the function and the leaf's shape.
    """
    if not rows.has_rows(problem.per_sample):
        return
    flags = rows.map_prefix(problem.per_sample, lambda _: True, lambda _: False, x)
    pairs = zip(jax.tree.leaves(flags), jax.tree.leaves(x), depends_on(function, x), strict=True)
    for is_row, leaf, used in pairs:
        if is_row and used:
            raise ValueError(
                f"{name} uses a per-sample leaf of outer_params (shape {jnp.shape(leaf)}), but "
                "only the inner loss is handed its rows: move the term to inner_loss, or leave the "
                "leaf out of Problem(per_sample=...)"
            )
