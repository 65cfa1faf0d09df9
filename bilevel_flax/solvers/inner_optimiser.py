"""What z's optimiser does to parameters, found out by asking it.

An Optax transformation is two opaque functions. Which parameters it moves is read from the
program of its update; what it does with the parameters' values (decay, projection) by
probing that update with small arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax import checks
from bilevel_flax.base import Problem, PyTree
from bilevel_flax.base.condition import is_condition
from bilevel_flax.solvers.step import tolerant
from bilevel_flax.tree import depends_on, filter_inexact

# A schedule may start at 0, and then nothing is seen at the first step.
_STEPS = (0, 1, 10, 1000)
_LONGEST_SIDE = 3
_ROUNDING = 1e-3
_NO_STEP = 1e-5  # of the step from parameters that are not 0


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
        none: z as a whole is then held where it is, to look at v and x there.

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
    update = functools.partial(_update, transform, _shaped(outer_params))
    jaxpr = jax.make_jaxpr(update)(floats, opt_state, floats)
    count = len(jax.tree.leaves(floats))
    rest = len(jaxpr.jaxpr.invars) - count
    moves = _reached(jaxpr.jaxpr, [True] * count + [False] * rest)
    if all(moves) or not any(moves):
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
        return _update(transform, _shaped(outer_params), gradient, state, params, value)

    if depends_on(update, floats, opt_state, floats, jnp.zeros(()))[-1]:
        checks.has_value(problem, "inner (a line search, Polyak's step)")


def _shaped(tree: PyTree) -> PyTree:
    """Zeros in the shapes of a tree whose values do not matter."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), leaf.dtype), tree)


def _update(
    transform: Any,
    outer_params: PyTree,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    value: Any = 0.0,
    times: int = 1,
) -> PyTree:
    """The last of some updates, with stand-ins for what a loop hands over beside the gradient."""
    value = jnp.asarray(value)
    updates = None
    for _ in range(times):
        updates, state = tolerant(transform).update(
            gradient,
            state,
            params,
            value=value,
            grad=gradient,
            value_fn=lambda params: value + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)),
            grad_fn=lambda params, _: gradient,
            outer_params=outer_params,
        )
    return updates


def _reached(jaxpr: Any, sources: Sequence[bool]) -> list[bool]:
    """For each output whether it depends on an input that is marked."""
    marked = {var for var, flag in zip(jaxpr.invars, sources, strict=True) if flag}
    is_literal = lambda atom: hasattr(atom, "val")
    hit = lambda atom: not is_literal(atom) and atom in marked
    for eqn in jaxpr.eqns:
        flags = [hit(atom) for atom in eqn.invars]
        if not any(flags):
            continue
        if eqn.primitive.name == "mul" and any(
            is_literal(atom) and np.all(np.asarray(atom.val) == 0) for atom in eqn.invars
        ):
            continue
        outputs = [True] * len(eqn.outvars)
        if "branches" in eqn.params:  # of the operands behind the index
            each = [_reached(branch.jaxpr, flags[1:]) for branch in eqn.params["branches"]]
            outputs = [any(column) for column in zip(*each, strict=True)]
        elif eqn.primitive.name in ("jit", "pjit", "closed_call"):
            outputs = _reached(eqn.params["jaxpr"].jaxpr, flags)
        marked |= {var for var, flag in zip(eqn.outvars, outputs, strict=True) if flag}
    return [hit(atom) for atom in jaxpr.outvars]


def applies_to_adjoint(
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree = None,
) -> bool:
    """Whether v, too, may be handed to z's transformation as its parameters.

    Where it looks at them at all: weight decay in front of a preconditioner, or under SGD, is part
    of the gradient of a regularised G, and so of the system that v solves. Decay behind a
    preconditioner (AdamW, Lion) is not: it would pull v to 0 whatever D_v is, so that v is not
    handed over (its system is then that of G alone). A distance from the start (DoG, Prodigy) or a
    norm that scales the step (LAMB) leaves alone what has no direction.

    Args:
        transform: z's optimiser.
        opt_state: its state, or shapes.
        params: z, or shapes.
        outer_params: x, for transformations that are handed it.

    Raises:
        ValueError: it projects or clips parameters (`optax.keep_params_nonnegative` ...): what that
            means for v depends on which constraints are active.
    """
    floats = filter_inexact(params)
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with jax.ensure_compile_time_eval():
        update = functools.partial(_update, transform, _shaped(shapes))
    used = depends_on(update, floats, opt_state, floats, jnp.zeros(()))
    with jax.ensure_compile_time_eval():
        if used[-1]:
            _refuse_values_of_the_loss(transform, update, floats)
        if not any(used[-1 - len(jax.tree.leaves(floats)) : -1]):
            return True
        return _probe(transform, update, floats)


def is_linear(
    transform: optax.GradientTransformation,
    params: PyTree,
    outer_params: PyTree = None,
) -> bool:
    """Whether twice the gradients give twice the steps (SGD, momentum), found out by asking.

    Args:
        transform: z's optimiser.
        params: z, or shapes.
        outer_params: x, for transformations that are handed it.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> [is_linear(tx, jnp.ones(2)) for tx in (optax.sgd(0.1, momentum=0.9), optax.adam(0.1))]
        [True, False]
    """
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with jax.ensure_compile_time_eval():
        point = jax.tree.map(_small, filter_inexact(params))
        nothing = _scaled(point, 0.0)
        # The second of two steps: some divide by what the step before has left (ACProp).
        update = functools.partial(_update, transform, _shaped(shapes), times=2)
        answers = []  # RAdam is linear in its first steps alone
        for step in _STEPS:
            state = _at_step(transform.init(nothing), step)
            once, *others = (
                update(_scaled(point, scale), state, nothing) for scale in (1.0, 1e4, 1e-4)
            )
            if not (_finite(once) and _largest(once) > 0):
                continue
            answers += [
                _near(other, _scaled(once, scale))
                for other, scale in zip(others, (1e4, 1e-4), strict=True)
            ]
    return bool(answers) and all(answers)


# In NumPy from here on, where it may be: what JAX does on numbers is compiled for every shape.


def _at_step(state: PyTree, step: int) -> PyTree:
    """The state of an optimiser, fresh but for its counters."""

    def counter(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jnp.asarray(np.full(leaf.shape, step, leaf.dtype))

    return jax.tree.map(counter, state)


def _scaled(tree: PyTree, factor: float) -> PyTree:
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) * np.asarray(factor, leaf.dtype)), tree
    )


def _refuse_values_of_the_loss(
    transform: optax.GradientTransformation, update: Callable[..., PyTree], params: PyTree
) -> None:
    """Raises where the first step's length depends on G's value, which is not what v minimises."""
    point = jax.tree.map(_small, params)
    state = transform.init(point)
    steps = [update(point, state, point, jnp.float32(value)) for value in (1.0, 8.0)]
    if not _near(*steps):
        raise ValueError(
            "inner takes steps by the value of the loss (Polyak, MoMo), and v, which would go "
            "through the same, does not minimise it: pass adjoint=, e.g. optax.adam"
        )


def _small(leaf: Any) -> jax.Array:
    """An array of the same rank, of numbers of both signs that differ."""
    shape = tuple(min(side, _LONGEST_SIDE) for side in leaf.shape)
    values = 3.0 + np.arange(int(np.prod(shape)))
    values[1::2] *= -1
    return jnp.asarray(values.reshape(shape), leaf.dtype)


def _probe(
    transform: optax.GradientTransformation, update: Callable[..., PyTree], params: PyTree
) -> bool:
    def at(step, gradient, params):
        # A state of these very parameters: some remember them (SAM, schedule-free).
        return update(gradient, _at_step(transform.init(params), step), params)

    point = jax.tree.map(_small, params)
    nothing = _scaled(point, 0.0)
    decays, normalises = False, False
    for step in _STEPS:
        still = functools.partial(at, step, nothing)
        pull, push = still(point), still(_scaled(point, -1.0))
        moves = not (_near(pull, nothing) and _near(push, nothing))
        if not moves or not _finite((pull, push)):  # 0 / 0: no gradient yet, no step
            continue
        odd = _near(push, _scaled(pull, -1.0))
        twice = still(_scaled(point, 2.0))
        if odd and _near(twice, _scaled(pull, 2.0)):
            decays = True
            once, doubled = at(step, point, nothing), at(step, _scaled(point, 2.0), nothing)
            normalises |= not _near(doubled, _scaled(once, 2.0))
        elif not (odd and _near(twice, pull)):  # nor decay in front of a normaliser
            raise ValueError(
                "inner changes parameters by their values (a projection, a clip, a constraint), "
                "and v, which would go through the same, is no parameter: pass adjoint=, e.g. the "
                "same optimiser without that part"
            )
    from_zero, from_point = (
        max(_largest(at(step, point, start)) for step in _STEPS) for start in (nothing, point)
    )
    if from_zero <= _NO_STEP * from_point:
        raise ValueError(
            "inner takes steps in proportion to the parameters (Fromage), and v starts at 0, where "
            "it would stay: pass adjoint=, e.g. optax.adam"
        )
    return not (decays and normalises)


def _largest(tree: PyTree) -> float:
    return max(float(np.max(np.abs(leaf), initial=0.0)) for leaf in _arrays(tree))


def _finite(tree: PyTree) -> bool:
    return all(bool(np.isfinite(leaf).all()) for leaf in _arrays(tree))


def _near(one: PyTree, other: PyTree) -> bool:
    def close(a, b):
        size = max(float(np.max(np.abs(a))), float(np.max(np.abs(b))))
        return float(np.max(np.abs(a - b))) <= _ROUNDING * size

    return all(close(a, b) for a, b in zip(_arrays(one), _arrays(other), strict=True) if a.size)


def _arrays(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
