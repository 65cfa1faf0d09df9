"""Which parameters z's optimiser moves, and what v's takes over from its state.

An Optax transformation is two opaque functions: what it moves is read from the program of its
update. What it does with the values of parameters: `optimiser_probes.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bilevel_flax import checks
from bilevel_flax.base import Problem, PyTree
from bilevel_flax.base.condition import is_condition
from bilevel_flax.solvers.optimiser_calls import (
    one_update,
    scaled,
    small,
    while_tracing,
    zeros_in_shape,
)
from bilevel_flax.solvers.waiting import about_to_act
from bilevel_flax.tree import depends_on, filter_inexact

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_RATES = (optax.ScaleByScheduleState, *_INJECTED)
# Of 0 they make 0, whatever their shape and dtype.
_KEEP_ZERO = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "neg", "copy")
_GROUPS = (optax.transforms.PartitionState, optax.MaskedState)


def trainable(
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree = None,
) -> PyTree:
    """For each leaf whether the transformation can move it; None: it can move all of them.

    A leaf is frozen where its update does not depend on any gradient: `optax.set_to_zero` under
    `optax.multi_transform`, `optax.freeze`, a learning rate that is the constant 0.

    Args:
        transform: z's optimiser.
        opt_state: its state, or shapes.
        params: z, or shapes.
        outer_params: x, for transformations that are handed it.

    Returns:
        A tree like `params` of booleans; leaves that are no floats are True. None where all are, or
        none: z as a whole is then held where it is, to look at v and x there. Where groups of
        parameters have rates of their own that the state tells (a schedule, a hyperparameter), a
        leaf's boolean is that of the moment, a scalar array: a group waits as long as its is 0.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> groups = {"head": "train", "body": "freeze"}
        >>> transform = optax.multi_transform(
        ...     {"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, groups
        ... )
        >>> params = {"head": jnp.ones(2), "body": jnp.ones(3)}
        >>> trainable(transform, transform.init(params), params)
        {'body': False, 'head': True}
    """
    floats = filter_inexact(params)
    update = functools.partial(one_update, transform, zeros_in_shape(outer_params))
    jaxpr = jax.make_jaxpr(lambda *args: update(*args)[0])(floats, opt_state, floats)
    count = len(jax.tree.leaves(floats))
    rest = len(jaxpr.jaxpr.invars) - count
    moves = _reached(jaxpr, [True] * count + [False] * rest)
    if not any(moves):
        return None
    if _rates_by_group(opt_state):
        now = _moves_now(transform, opt_state, floats, outer_params)
        resting = ~functools.reduce(jnp.logical_or, now)
        moves = [flag and (at | resting) for flag, at in zip(moves, now, strict=True)]
    elif all(moves):
        return None
    flags = jax.tree.unflatten(jax.tree.structure(floats), moves)
    return jax.tree.map(
        lambda flag, _: True if flag is None else flag,
        flags,
        params,
        is_leaf=lambda node: node is None,
    )


def check_value(
    problem: Problem,
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree = None,
) -> None:
    """Raises where the loss's value decides on the step and the inner problem is a condition.

    Args: the problem; as `trainable`.

    Raises:
        UserError: a line search, Polyak's step, a plateau ...
    """
    if not is_condition(problem.inner_loss):
        return
    floats = filter_inexact(params)

    def update(gradient, state, params, value):
        x = zeros_in_shape(outer_params)
        return one_update(transform, x, gradient, state, params, value)[0]

    if depends_on(update, floats, opt_state, floats, jnp.zeros(()))[-1]:
        checks.has_value(problem, "inner (a line search, Polyak's step)")


def _rates_by_group(opt_state: PyTree) -> bool:
    """Whether the state holds rates, and parameters in groups that may have different ones."""

    def holds(tree, kinds, inside):
        is_kind = lambda node: isinstance(node, kinds)
        nodes = filter(is_kind, jax.tree.leaves(tree, is_leaf=is_kind))
        return any(inside(node) for node in nodes)

    some = lambda _: True
    return holds(opt_state, _GROUPS, lambda group: holds(group, _RATES, some)) or holds(
        opt_state, _INJECTED, lambda rates: holds(rates.inner_state, _GROUPS, some)
    )


def _moves_now(
    transform: Any, opt_state: PyTree, params: PyTree, outer_params: PyTree
) -> list[jax.Array]:
    """For each leaf whether a gradient would move it at the present rates; on small arrays."""
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with while_tracing():
        point = jax.tree.map(small, params)
        nothing = scaled(point, 0.0)
        update = functools.partial(one_update, transform, zeros_in_shape(shapes), point)
        ready = about_to_act(lambda state: update(state, nothing)[1], transform.init(nothing))
    updates, _ = update(share_step_count(ready, opt_state), nothing)
    return [jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates)]


def share_step_count(state: PyTree, inner_opt_state: PyTree) -> PyTree:
    """An optimiser's state with z's clock in its schedules, and z's injected hyperparameters.

    Other counters stay its own: where v moves in every k-th step only, an optimiser that acts in
    every k-th of its calls (`optax.MultiSteps`) would never act on z's.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> tx = optax.sgd(optax.linear_schedule(0.1, 0.0, 100))
        >>> z_state, v_state = tx.init(jnp.zeros(2)), tx.init(jnp.zeros(2))
        >>> for _ in range(3):
        ...     _, z_state = tx.update(jnp.ones(2), z_state)
        >>> int(optax.tree.get(bf.adjoint.share_step_count(v_state, z_state), "count"))
        3
    """

    def shared(own, of_z):
        if isinstance(own, optax.ScaleByScheduleState):
            return of_z
        if isinstance(own, _INJECTED):
            return of_z._replace(inner_state=share_step_count(own.inner_state, of_z.inner_state))
        return own

    is_leaf = lambda node: isinstance(node, _RATES)
    return jax.tree.map(shared, state, inner_opt_state, is_leaf=is_leaf)


def _reached(closed: Any, sources: Sequence[bool], given: Sequence[Any] = ()) -> list[bool]:
    """For each output of a closed jaxpr whether it depends on an input that is marked.

    Args:
        closed: the program of an update.
        sources: which of its inputs are marked.
        given: its inputs' values where they are known, else None; (): none is.
    """
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, given, strict=False))
    marked = {var for var, flag in zip(jaxpr.invars, sources, strict=True) if flag}
    is_literal = lambda atom: hasattr(atom, "val")
    hit = lambda atom: not is_literal(atom) and atom in marked

    def value(atom):
        found = atom.val if is_literal(atom) else known.get(atom)
        unknown = found is None or isinstance(found, Tracer)
        is_key = jnp.issubdtype(getattr(found, "dtype", np.float32), jax.dtypes.prng_key)
        return None if unknown or is_key else np.asarray(found)

    for eqn in jaxpr.eqns:
        flags = [hit(atom) for atom in eqn.invars]
        name, values = eqn.primitive.name, [value(atom) for atom in eqn.invars]
        if name in _KEEP_ZERO:
            known[eqn.outvars[0]] = values[0]
        if not any(flags):
            continue
        if name == "mul" and any(v is not None and np.all(v == 0) for v in values):
            continue
        outputs = [True] * len(eqn.outvars)
        if name == "select_n" and values[0] is not None:
            outputs = [any(flags[1 + int(case)] for case in np.unique(values[0]))]
        elif "branches" in eqn.params:  # of the operands behind the index
            branches = eqn.params["branches"]
            each = [_reached(branch, flags[1:], values[1:]) for branch in branches]
            outputs = [any(column) for column in zip(*each, strict=True)]
        elif name in ("jit", "pjit", "closed_call"):
            called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            outputs = _reached(called, flags, values)
        marked |= {var for var, flag in zip(eqn.outvars, outputs, strict=True) if flag}
    return [hit(atom) for atom in jaxpr.outvars]
