"""Constraints on parameters that z's optimiser keeps (a bound, a soft threshold), and who is held.

Where a bound holds an entry of z, it does not answer to x: it is no part of v's system. This is
exact where the entries that are held are the same around x (strict complementarity).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.base import PyTree
from bilevel_flax.checks import UserError
from bilevel_flax.solvers.inner_optimiser import share_step_count
from bilevel_flax.solvers.optimiser_calls import (
    Asked,
    asked,
    one_update,
    scaled,
    small,
    while_tracing,
    zeros_in_shape,
)
from bilevel_flax.solvers.optimiser_probes import changes_parameters
from bilevel_flax.solvers.waiting import about_to_act, calls_in_a_step
from bilevel_flax.tree import filter_inexact

# Of parameters of order 1: within a bound, and beyond it.
_SCALES = (1.0, 10.0, 1e3, 1e6)
_APART = 1e-2


def without_held(
    flags: PyTree,
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree,
    gradient: Callable[[], PyTree],
) -> PyTree:
    """`trainable`'s flags, entry by entry where there is a constraint; see `free_entries`."""
    free = free_entries(transform, opt_state, params, outer_params, gradient)
    if free is None or flags is None:
        return flags if free is None else free
    return jax.tree.map(lambda entries, flag: entries & flag, free, flags)


def free_entries(
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree,
    gradient: Callable[[], PyTree],
) -> PyTree:
    """For each entry of z's leaves whether no constraint holds it; None: there is no constraint.

    An entry is held where its gradient does not move it: it is at its bound and is pushed beyond
    it, or at rest where all others are pulled to (0 under a soft threshold).

    Args:
        transform: z's optimiser, and the three after it as in `trainable`.
        opt_state: its state.
        params: z.
        outer_params: x.
        gradient: makes ∇₁G at z; called where there is a constraint.

    Raises:
        UserError: the bound of one entry depends on others (a ball, a sphere, a simplex).
    """
    question = asked(transform, opt_state, params, outer_params)
    if not question.reads_params:
        return None
    with while_tracing():
        if not changes_parameters(transform, question):
            return None
        _refuse_joint(transform, question)
        point = jax.tree.map(small, question.floats)
        shapes = jax.eval_shape(lambda tree: tree, outer_params)
        update = functools.partial(one_update, transform, zeros_in_shape(shapes))
        ready = about_to_act(lambda s: update(point, s, point)[1], transform.init(point))
    z = question.floats
    state = share_step_count(_counters_of(ready, transform.init(z)), opt_state)

    def moved(d_z, params=z):
        return update(d_z, state, params)[0]

    # Long steps: a short one may be lost in rounding.
    far = jax.tree.map(lambda leaf: 1 + jnp.abs(leaf), z)
    up, down = moved(jax.tree.map(jnp.negative, far)), moved(far)
    nothing = jax.tree.map(jnp.zeros_like, z)
    still = moved(nothing)
    # What a projection has brought within its bound stays there; a threshold goes on.
    again = moved(nothing, jax.tree.map(jnp.add, z, still))
    shrinks = functools.reduce(jnp.logical_or, [jnp.any(u != 0) for u in jax.tree.leaves(again)])
    d_z = filter_inexact(gradient())
    gathered = calls_in_a_step(ready)
    now = moved(jax.tree.map(lambda leaf: leaf * gathered, d_z))

    def free(up, down, still, now, d_z):
        at_bound = ((up != 0) != (down != 0)) & (d_z != 0)
        return ~((at_bound | (shrinks & (still == 0))) & (now == 0))

    entries = jax.tree.map(free, up, down, still, now, d_z)
    fill = lambda entry, _: True if entry is None else entry
    return jax.tree.map(fill, entries, params, is_leaf=lambda node: node is None)


def _counters_of(ready: PyTree, fresh: PyTree) -> PyTree:
    """The state of z's shape with the counters of the one that is about to act."""

    def counter(leaf, of_small):
        is_counter = jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and jnp.ndim(leaf) == 0
        return of_small if is_counter else leaf

    return jax.tree.map(counter, fresh, ready)


def _refuse_joint(transform: optax.GradientTransformation, question: Asked) -> None:
    """Raises where an entry's landing depends on other entries."""
    point = jax.tree.map(small, question.floats)
    nothing, state = scaled(point, 0.0), transform.init(point)

    def landing(params):
        updates = question.update(nothing, state, params)
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True)
        return [np.asarray(p) + np.asarray(u) for p, u in leaves]

    def changed(params, leaves, entries):
        flat, tree = jax.tree.flatten(params)
        for i in leaves:
            array = np.array(flat[i])
            array.reshape(-1)[entries] *= 3
            flat[i] = jnp.asarray(array)
        return jax.tree.unflatten(tree, flat)

    count = len(jax.tree.leaves(point))
    every, half = range(count), range(0, count, 2)
    for scale in _SCALES:
        at = scaled(point, scale)
        before = landing(at)
        one, other = (
            landing(changed(at, every, slice(0, 1))),
            landing(changed(at, half, slice(None))),
        )
        rest = [(b.reshape(-1)[1:], o.reshape(-1)[1:]) for b, o in zip(before, one, strict=True)]
        rest += [(b, o) for b, o in zip(before[1::2], other[1::2], strict=True)]
        if any(a.size and np.abs(a - b).max() > _APART * np.abs(a).max() for a, b in rest):
            raise UserError(
                "inner keeps parameters on a ball, a sphere or a simplex: the bound of one depends "
                "on others, which v's system does not know; give the inner problem by its "
                "condition, bf.Problem.from_condition(z - project(z - gradient)), and inner "
                "without the projection"
            )
