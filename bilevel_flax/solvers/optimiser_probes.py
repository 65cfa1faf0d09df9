"""What z's optimiser does with the values of parameters (decay, projection), by asking it.

An Optax transformation is two opaque functions; these hand its update small arrays.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.base import PyTree
from bilevel_flax.solvers.step import tolerant
from bilevel_flax.solvers.waiting import about_to_act, has_branches, telling_steps
from bilevel_flax.tree import depends_on, filter_inexact, is_inexact

_LONGEST_SIDE = 3
_ROUNDING = 1e-3
_NEAR = 0.01
_FAR = 1e6  # a bound that parameters of order 1 never meet
_OFF_GRID = 0.0537  # whole numbers lie on the grid of what rounds
_NOISE = 2e-5  # of what remembers parameters, and subtracts them
_NO_STEP = 1e-5  # of the step from parameters that are not 0
_CONSTRAINT = (
    "inner changes parameters by their values (a projection, a clip, a constraint), and v, which "
    "would go through the same, is no parameter: pass adjoint=, e.g. the same optimiser without "
    "that part"
)


@contextlib.contextmanager
def while_tracing() -> Iterator[None]:
    """Numbers of a few bytes, though a trainer may forbid transfers within its step."""
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        yield


def zeros_in_shape(tree: PyTree) -> PyTree:
    """Zeros in the shapes of a tree whose values do not matter."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), leaf.dtype), tree)


def one_update(
    transform: Any,
    outer_params: PyTree,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    value: Any = 0.0,
) -> tuple[PyTree, PyTree]:
    """An update, with stand-ins for what a loop hands over beside the gradient."""
    value = jnp.asarray(value)
    return tolerant(transform).update(
        gradient,
        state,
        params,
        value=value,
        grad=gradient,
        value_fn=lambda params: value + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)),
        grad_fn=lambda params, _: gradient,
        outer_params=outer_params,
    )


def acting_update(
    transform: Any,
    outer_params: PyTree,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    value: Any = 0.0,
    times: int = 1,
) -> PyTree:
    """The last of some updates, each the one in which an optimiser that gathers gradients acts."""
    # A branch that stands alone would be compiled anew at each call.
    ask = _compiled(transform) if has_branches(state) else functools.partial(one_update, transform)

    def advance(state):
        return ask(outer_params, gradient, state, params, value)

    updates = None
    for _ in range(times):
        updates, state = advance(about_to_act(lambda old: advance(old)[1], state))
    return updates


@functools.lru_cache(maxsize=4)
def _compiled(transform: Any) -> Callable[..., tuple[PyTree, PyTree]]:
    return jax.jit(functools.partial(one_update, transform))


class Asked(NamedTuple):
    """An optimiser as it answers to questions, on small arrays."""

    update: Callable[..., PyTree]  # of gradient, state, parameters and the loss's value
    floats: PyTree
    reads_params: bool
    reads_value: bool


def asked(transform: Any, opt_state: PyTree, params: PyTree, outer_params: PyTree) -> Asked:
    """An optimiser's update, and whether it looks at parameters and at the loss's value."""
    floats = filter_inexact(params)
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with while_tracing():
        about = transform, zeros_in_shape(shapes)
    traced = lambda *args: one_update(*about, *args)[0]
    used = depends_on(traced, floats, opt_state, floats, jnp.zeros(()))
    reads_params = any(used[-1 - len(jax.tree.leaves(floats)) : -1])
    return Asked(functools.partial(acting_update, *about), floats, reads_params, used[-1])


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
        raise ValueError(
            "inner takes steps in proportion to the parameters (Fromage), and v starts at 0, where "
            "it would stay: pass adjoint=, e.g. optax.adam"
        )
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
        if not _near(*map(_floats, states)):
            return False  # it remembers where it was: a distance, an average
        for step in telling_steps(states[0]):
            state = _at_step(states[0], step)
            still, short, long = (
                update(gradient, state, at)
                for gradient, at in ((nothing, point), (point, point), (point, twice))
            )
            if _finite((still, short, long)) and not _near(short, long):
                return _near(still, nothing)
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
        near = jax.tree.map(lambda leaf: jnp.abs(leaf) * jnp.asarray(_NEAR, leaf.dtype), point)
        for step in telling_steps(fresh):
            state = _at_step(fresh, step)
            sides = [_rates(update, state, scaled(near, sign), nothing) for sign in (1.0, -1.0)]
            rates = jax.tree.map(min, *sides)
            if any(jax.tree.leaves(rates)) and np.isfinite(jax.tree.leaves(rates)).all():
                return rates
    return None


def _rates(update: Callable[..., PyTree], state: PyTree, at: PyTree, nothing: PyTree) -> PyTree:
    """For each leaf the pull on parameters over the push of an equal gradient; 0: no decay."""
    pull, outwards = update(nothing, state, at), update(scaled(at, -1.0), state, at)
    if not (
        _parallel(pull, at) and _near(update(nothing, state, scaled(at, 2.0)), scaled(pull, 2.0))
    ):
        return jax.tree.map(lambda _: 0.0, pull)
    return jax.tree.map(_rate, pull, outwards)


def _rate(pull: jax.Array, outwards: jax.Array) -> float:
    push = _largest(np.asarray(outwards) - np.asarray(pull))
    return _largest(pull) / push if push else (np.inf if _largest(pull) else 0.0)


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
            state = _at_step(transform.init(nothing), step)
            once, *others = (
                update(scaled(point, scale), state, nothing) for scale in (1.0, 1e4, 1e-4)
            )
            if not (_finite(once) and _largest(once) > 0):
                continue
            answers += [
                _near(other, scaled(once, scale))
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


def scaled(tree: PyTree, factor: float) -> PyTree:
    """A tree times a number, each leaf in its dtype."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) * np.asarray(factor, leaf.dtype)), tree
    )


def _refuse_values_of_the_loss(
    transform: optax.GradientTransformation, update: Callable[..., PyTree], params: PyTree
) -> None:
    """Raises where the first step's length depends on G's value, which is not what v minimises."""
    point = jax.tree.map(small, params)
    state = transform.init(point)
    steps = [update(point, state, point, jnp.float32(value)) for value in (1.0, 8.0)]
    if not _near(*steps):
        raise ValueError(
            "inner takes steps by the value of the loss (Polyak, MoMo), and v, which would go "
            "through the same, does not minimise it: pass adjoint=, e.g. optax.adam"
        )


def small(leaf: Any) -> jax.Array:
    """An array of the same rank, of numbers of both signs that differ."""
    shape = tuple(min(side, _LONGEST_SIDE) for side in leaf.shape)
    values = 3.0 + np.arange(int(np.prod(shape)))
    values[1::2] *= -1
    return jnp.asarray(values.reshape(shape), leaf.dtype)


class _Answers(NamedTuple):
    projects: bool = False
    decays_behind: bool = False  # what normalises the gradient
    in_proportion: bool = False  # to the parameters: no step from 0


def _probe(
    transform: optax.GradientTransformation, update: Callable[..., PyTree], params: PyTree
) -> _Answers:
    def at(step, gradient, params):
        # A state of these very parameters: some remember them (SAM, schedule-free).
        return update(gradient, _at_step(transform.init(params), step), params)

    point = jax.tree.map(small, params)
    nothing = scaled(point, 0.0)
    decays, normalises = False, False
    steps = telling_steps(transform.init(point))
    for step in steps:
        still = functools.partial(at, step, nothing)
        pull, push = still(point), still(scaled(point, -1.0))
        if not _finite((pull, push)):  # 0 / 0: no gradient yet, no step
            continue
        odd, twice = _near(push, scaled(pull, -1.0)), still(scaled(point, 2.0))
        linear = odd and _near(twice, scaled(pull, 2.0))
        if _largest((pull, push)) == 0 or linear and _is_rounding(pull, point):
            off_grid = jax.tree.map(
                lambda p: jnp.asarray(np.asarray(p) + np.asarray(_OFF_GRID, p.dtype)), point
            )
            rounded, bounded = still(off_grid), still(scaled(point, _FAR))
            if _largest(rounded) > _NOISE or _largest(bounded) > 1.0:
                return _Answers(projects=True)
            continue
        once, doubled = (at(step, scaled(point, scale), nothing) for scale in (1.0, 2.0))
        if linear:
            if not _parallel(pull, point):  # onto a subspace
                return _Answers(projects=True)
            decays = True
            normalises |= not _near(doubled, scaled(once, 2.0))
        # Decay in front of a normaliser pulls as a gradient does; a proximal step does not.
        elif not (odd and _near(twice, pull) and _near(*map(_sizes, (once, pull)))):
            return _Answers(projects=True)
    from_zero, from_point = (
        max(_largest(at(step, point, start)) for step in steps) for start in (nothing, point)
    )
    in_proportion = from_zero <= _NO_STEP * from_point
    return _Answers(decays_behind=decays and normalises, in_proportion=in_proportion)


def _is_rounding(pull: PyTree, params: PyTree) -> bool:
    """Of what remembers parameters, and subtracts them: the least digits, in no direction."""
    leaves = zip(*(jax.tree.leaves(tree) for tree in (pull, params)), strict=True)
    digits = all(_largest(a) <= 4 * float(jnp.finfo(b.dtype).eps) * _largest(b) for a, b in leaves)
    return digits and not _parallel(pull, params)


def _parallel(one: PyTree, other: PyTree) -> bool:
    """Leaf by leaf."""
    pairs = zip(*(jax.tree.leaves(tree) for tree in (one, other)), strict=True)
    return all(_near(a, b * (np.vdot(b, a) / np.vdot(b, b))) for a, b in pairs if b.size)


def _floats(state: PyTree) -> list:
    return [leaf for leaf in jax.tree.leaves(state) if is_inexact(leaf)]


def _sizes(tree: PyTree) -> PyTree:
    return jax.tree.map(np.abs, tree)


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
