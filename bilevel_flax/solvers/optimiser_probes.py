"""What z's optimiser does with the values of parameters (decay, projection), by asking it.

Each question is put by `optimiser_calls`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.base import PyTree
from bilevel_flax.solvers.optimiser_calls import (
    Asked,
    acting_update,
    asked,
    at_step,
    finite,
    largest,
    near,
    parallel,
    scaled,
    small,
    while_tracing,
    zeros_in_shape,
)
from bilevel_flax.solvers.waiting import telling_steps
from bilevel_flax.tree import filter_inexact, is_inexact

_NEAR = 0.01
_FAR = 1e6  # a bound that parameters of order 1 never meet
_OFF_GRID = 0.0537  # whole numbers lie on the grid of what rounds
_NOISE = 2e-5  # of what remembers parameters, and subtracts them
_NO_STEP = 1e-5  # of the step from parameters that are not 0
_BY_VALUE = (
    "inner takes steps by the value of the loss (Polyak, MoMo, a line search), and v, which would "
    "go through the same, does not minimise it: pass adjoint=, e.g. optax.adam"
)
_IN_PROPORTION = (
    "inner takes steps in proportion to the parameters (Fromage), and v starts at 0, where it "
    "would stay: pass adjoint=, e.g. optax.adam"
)
_CONSTRAINT = (
    "inner changes parameters by their values (a projection, a clip, a constraint), and v, which "
    "would go through the same, is no parameter: pass adjoint=, e.g. the same optimiser without "
    "that part"
)


def applies_to_adjoint(
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree = None,
) -> bool:
    """Whether v, too, may be handed to z's transformation as its parameters.

    Where it pulls at them at all: weight decay in front of a preconditioner, or under SGD, is part
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
    update, floats, reads_params, reads_value = asked(transform, opt_state, params, outer_params)
    with while_tracing():
        if reads_value:
            _refuse_values_of_the_loss(transform, update, floats)
        if not reads_params:
            return True
        answers = _probe(transform, update, floats)
    if answers.projects:
        raise ValueError(_CONSTRAINT)
    if answers.in_proportion:
        # A line search goes nowhere from 0 either: it looks for a lower value, not for v.
        raise ValueError(_BY_VALUE if reads_value else _IN_PROPORTION)
    return not answers.decays_behind


def changes_parameters(transform: optax.GradientTransformation, question: Asked) -> bool:
    """Whether it projects or clips parameters."""
    return _probe(transform, question.update, question.floats).projects


def scales_by_parameters(
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree = None,
) -> bool:
    """Whether parameters give the step its length and nothing else (LAMB, LARS, adaptive clips).

    V, which starts at 0, would hardly leave it by steps as long as itself; those of z serve.

    Args: as `applies_to_adjoint`.
    """
    update, floats, reads_params, _ = asked(transform, opt_state, params, outer_params)
    if not reads_params:
        return False
    with while_tracing():
        point = jax.tree.map(small, floats)
        nothing, twice = scaled(point, 0.0), scaled(point, 2.0)
        states = [transform.init(start) for start in (point, twice)]
        if not near(*map(_floats, states)):
            return False  # it remembers where it was: a distance, an average
        for step in telling_steps(states[0]):
            state = at_step(states[0], step)
            still, short, long = (
                update(gradient, state, at)
                for gradient, at in ((nothing, point), (point, point), (point, twice))
            )
            if finite((still, short, long)) and not near(short, long):
                return near(still, nothing)
    return False


def coupled_decay(
    transform: optax.GradientTransformation,
    opt_state: PyTree,
    params: PyTree,
    outer_params: PyTree = None,
) -> PyTree:
    """Weight decay λ in front of a linear step: z's gradient is ∇₁G + λz, and its Hessian H + λI.

    Args: as `applies_to_adjoint`.

    Returns:
        A tree like `params` of numbers, one for each float leaf (else None); None: no such decay.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> transform = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
        >>> round(coupled_decay(transform, transform.init(jnp.ones(2)), jnp.ones(2)), 4)
        0.5
    """
    update, floats, reads_params, reads_value = asked(transform, opt_state, params, outer_params)
    if reads_value or not reads_params or not is_linear(transform, params, outer_params):
        return None
    with while_tracing():
        point = jax.tree.map(small, floats)
        nothing = scaled(point, 0.0)
        fresh = transform.init(point)
        # Within wide bounds, and on both sides of 0: a projection acts on one of them.
        within = jax.tree.map(lambda leaf: jnp.abs(leaf) * jnp.asarray(_NEAR, leaf.dtype), point)
        for step in telling_steps(fresh):
            state = at_step(fresh, step)
            sides = [_rates(update, state, scaled(within, sign), nothing) for sign in (1.0, -1.0)]
            rates = jax.tree.map(min, *sides)
            if any(jax.tree.leaves(rates)) and np.isfinite(jax.tree.leaves(rates)).all():
                return rates
    return None


def _rates(update: Callable[..., PyTree], state: PyTree, at: PyTree, nothing: PyTree) -> PyTree:
    """For each leaf the pull on parameters over the push of an equal gradient; 0: no decay."""
    pull, outwards = update(nothing, state, at), update(scaled(at, -1.0), state, at)
    if not (
        parallel(pull, at) and near(update(nothing, state, scaled(at, 2.0)), scaled(pull, 2.0))
    ):
        return jax.tree.map(lambda _: 0.0, pull)
    return jax.tree.map(_rate, pull, outwards)


def _rate(pull: jax.Array, outwards: jax.Array) -> float:
    push = largest(np.asarray(outwards) - np.asarray(pull))
    return largest(pull) / push if push else (np.inf if largest(pull) else 0.0)


def is_linear(
    transform: optax.GradientTransformation,
    params: PyTree,
    outer_params: PyTree = None,
) -> bool:
    """Whether twice the gradients give twice the steps (SGD, momentum), found out by asking.

    Steps whose length the parameters give (LARS) count as if they did not.

    Args:
        transform: z's optimiser.
        params: z, or shapes.
        outer_params: x, for transformations that are handed it.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> [is_linear(tx, jnp.ones(2)) for tx in (optax.sgd(0.1, momentum=0.9), optax.adam(0.1))]
        [True, False]
    """
    with while_tracing():
        point = jax.tree.map(small, filter_inexact(params))
        fresh = transform.init(point)
    if scales_by_parameters(transform, fresh, point, outer_params):
        return False
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with while_tracing():
        point = jax.tree.map(small, filter_inexact(params))
        nothing = scaled(point, 0.0)
        # The second of two steps: some divide by what the step before has left (ACProp).
        update = functools.partial(acting_update, transform, zeros_in_shape(shapes), times=2)
        answers = []  # RAdam is linear in its first steps alone
        for step in telling_steps(fresh):
            state = at_step(transform.init(nothing), step)
            once, *others = (
                update(scaled(point, scale), state, nothing) for scale in (1.0, 1e4, 1e-4)
            )
            if not (finite(once) and largest(once) > 0):
                continue
            answers += [
                near(other, scaled(once, scale))
                for other, scale in zip(others, (1e4, 1e-4), strict=True)
            ]
    return bool(answers) and all(answers)


def _refuse_values_of_the_loss(
    transform: optax.GradientTransformation, update: Callable[..., PyTree], params: PyTree
) -> None:
    """Raises where the first step's length depends on G's value, which is not what v minimises."""
    point = jax.tree.map(small, params)
    state = transform.init(point)
    steps = [update(point, state, point, jnp.float32(value)) for value in (1.0, 8.0)]
    if not near(*steps):
        raise ValueError(_BY_VALUE)


class _Answers(NamedTuple):
    projects: bool = False
    decays_behind: bool = False  # what normalises the gradient
    in_proportion: bool = False  # to the parameters: no step from 0


def _probe(
    transform: optax.GradientTransformation, update: Callable[..., PyTree], params: PyTree
) -> _Answers:
    def at(step, gradient, params):
        # A state of these very parameters: some remember them (SAM, schedule-free).
        return update(gradient, at_step(transform.init(params), step), params)

    point = jax.tree.map(small, params)
    nothing = scaled(point, 0.0)
    decays, normalises = False, False
    steps = telling_steps(transform.init(point))
    for step in steps:
        still = functools.partial(at, step, nothing)
        pull, push = still(point), still(scaled(point, -1.0))
        if not finite((pull, push)):  # 0 / 0: no gradient yet, no step
            continue
        odd, twice = near(push, scaled(pull, -1.0)), still(scaled(point, 2.0))
        linear = odd and near(twice, scaled(pull, 2.0))
        if largest((pull, push)) == 0 or linear and _is_rounding(pull, point):
            off_grid = jax.tree.map(
                lambda p: jnp.asarray(np.asarray(p) + np.asarray(_OFF_GRID, p.dtype)), point
            )
            rounded, bounded = still(off_grid), still(scaled(point, _FAR))
            if largest(rounded) > _NOISE or largest(bounded) > 1.0:
                return _Answers(projects=True)
            continue
        once, doubled = (at(step, scaled(point, scale), nothing) for scale in (1.0, 2.0))
        if linear:
            if not parallel(pull, point):  # onto a subspace
                return _Answers(projects=True)
            decays = True
            normalises |= not near(doubled, scaled(once, 2.0))
        # Decay in front of a normaliser pulls as a gradient does; a proximal step does not.
        elif not (odd and near(twice, pull) and near(*map(_sizes, (once, pull)))):
            return _Answers(projects=True)
    from_zero, from_point = (
        max(largest(at(step, point, start)) for step in steps) for start in (nothing, point)
    )
    in_proportion = from_zero <= _NO_STEP * from_point
    return _Answers(decays_behind=decays and normalises, in_proportion=in_proportion)


def _is_rounding(pull: PyTree, params: PyTree) -> bool:
    """Of what remembers parameters, and subtracts them: the least digits, in no direction."""
    leaves = zip(*(jax.tree.leaves(tree) for tree in (pull, params)), strict=True)
    digits = all(largest(a) <= 4 * float(jnp.finfo(b.dtype).eps) * largest(b) for a, b in leaves)
    return digits and not parallel(pull, params)


def _floats(state: PyTree) -> list:
    return [leaf for leaf in jax.tree.leaves(state) if is_inexact(leaf)]


def _sizes(tree: PyTree) -> PyTree:
    return jax.tree.map(np.abs, tree)
