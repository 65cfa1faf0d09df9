"""The user's losses as functions of their differentiable leaves, checked at trace time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Aux, Problem
from bilevel_flax.minibatches import repeat_real
from bilevel_flax.oracles.loss_errors import explain
from bilevel_flax.tree import is_inexact, split


class _NotHere:
    """Stands for a per-sample leaf where none may be used; any use of it raises."""

    def __init__(self, shape, name):
        self._described = f"{name} uses a per-sample leaf of outer_params (shape {shape})"

    def _refuse(self, *args, **kwargs):
        raise ValueError(
            f"{self._described}, but only the inner loss is handed its rows: move the term to "
            "inner_loss, or leave the leaf out of Problem(per_sample=...)"
        )

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__array__", "__jax_array__"):
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __len__ = __iter__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = __abs__ = __float__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = object.__hash__


def checked_call(loss: Callable, name: str, stateful: bool, args: tuple, context: tuple):
    """Runs a user's loss; checks what it returns at trace time."""
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
                "bf.Aux(model_state, metrics)) with Problem(stateful=True)"
            )
        value, aux = out, Aux()
    if jnp.shape(value) != () or not is_inexact(value):
        raise TypeError(
            f"{name} must return a real scalar, got shape {jnp.shape(value)} "
            f"dtype {jnp.result_type(value)}: take the mean over the minibatch"
        )
    return value, aux


def _handed_on(before, after):
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


def lowered(problem: Problem, tree):
    """The tree with its floats in `problem.compute_dtype`; `mask`s stay, for they are summed."""
    if problem.compute_dtype is None:
        return tree

    def cast(path, leaf):
        is_mask = path and getattr(path[-1], "key", None) in ("mask", "example_mask")
        if is_mask or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        return jnp.asarray(leaf, problem.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, tree)


def _raised(problem: Problem, value, before, after):
    """A loss and a model state in the dtypes that they have without a `compute_dtype`."""
    if problem.compute_dtype is None:
        return value, after
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    if jax.tree.structure(before) == jax.tree.structure(after):
        after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), after, before)
    return value, after


def inner(problem: Problem, z, x, batch, model_state, rng):
    """G as a function of the differentiable leaves of z and of x's rows -> (loss, aux)."""
    z_split = split(z)
    x_split = split(rows.gather(problem.per_sample, x, batch))
    examples = lowered(problem, repeat_real(batch))

    def loss(z_leaves, x_leaves):
        args = lowered(problem, z_split.merge(z_leaves)), x_split.merge(x_leaves), examples
        context = (model_state, rng)
        value, aux = checked_call(problem.inner_loss, "inner_loss", problem.stateful, args, context)
        after = _handed_on(model_state, aux.model_state)
        value, after = _raised(problem, value, model_state, after)
        return value, aux._replace(model_state=after)

    if problem.remat:
        loss = jax.checkpoint(loss)

    def as_outer(leaves):
        return rows.wrap(problem.per_sample, x_split.complete(leaves), x, batch)

    return loss, z_split, x_split, as_outer


def visible(problem: Problem, x, name: str):
    """The leaves of x that the loss `name` may use, and the way to x with stand-ins for others."""
    shown = rows.map_prefix(problem.per_sample, lambda _: None, lambda leaf: leaf, x)
    hidden = rows.map_prefix(
        problem.per_sample, lambda leaf: _NotHere(jnp.shape(leaf), name), lambda _: None, x
    )

    def restore(shown):
        return jax.tree.map(
            lambda seen, stand_in: stand_in if seen is None else seen,
            shown,
            hidden,
            is_leaf=lambda node: node is None,
        )

    return split(shown), restore


def outer(problem: Problem, z, x, batch, model_state, rng):
    """F as a function of the differentiable leaves of z and of x's visible ones -> (loss, aux)."""
    z_split = split(z)
    x_split, restore = visible(problem, x, "outer_loss")
    examples = lowered(problem, repeat_real(batch))

    def loss(z_leaves, x_leaves):
        args = lowered(problem, z_split.merge(z_leaves)), restore(x_split.merge(x_leaves)), examples
        context = (model_state, rng)
        value, aux = checked_call(problem.outer_loss, "outer_loss", problem.stateful, args, context)
        value, after = _raised(problem, value, model_state, aux.model_state)
        return value, aux._replace(model_state=after)

    return loss, z_split, x_split
