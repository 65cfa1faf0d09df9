"""What z's optimiser does to parameters, found out by asking it.

An Optax transformation is two opaque functions. Which parameters it moves is read from the
program of its update; what it does with the parameters' values (decay, projection) by
probing that update with small arrays.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bilevel_flax import checks
from bilevel_flax.base import Problem, PyTree
from bilevel_flax.base.condition import is_condition
from bilevel_flax.solvers.step import tolerant
from bilevel_flax.tree import depends_on, filter_inexact, is_inexact

# A schedule may start at 0, and then nothing is seen at the first step.
_STEPS = (0, 1, 10, 1000)
_LONGEST_SIDE = 3
_ROUNDING = 1e-3
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_RATES = (optax.ScaleByScheduleState, *_INJECTED)
# Of 0 they make 0, whatever their shape and dtype.
_KEEP_ZERO = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "neg", "copy")
_GROUPS = (optax.transforms.PartitionState, optax.MaskedState)
_FAR = 1e6  # a bound that parameters of order 1 never meet
_OFF_GRID = 0.0537  # whole numbers lie on the grid of what rounds
_NOISE = 2e-5  # of what remembers parameters, and subtracts them
_CONSTRAINT = (
    "inner changes parameters by their values (a projection, a clip, a constraint), and v, which "
    "would go through the same, is no parameter: pass adjoint=, e.g. the same optimiser without "
    "that part, which is right where no constraint is active"
)
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
    update = functools.partial(_update, transform, _shaped(outer_params))
    jaxpr = jax.make_jaxpr(update)(floats, opt_state, floats)
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
        return _update(transform, _shaped(outer_params), gradient, state, params, value)

    if depends_on(update, floats, opt_state, floats, jnp.zeros(()))[-1]:
        checks.has_value(problem, "inner (a line search, Polyak's step)")


@contextlib.contextmanager
def _while_tracing() -> Iterator[None]:
    """Numbers of a few bytes, though a trainer may forbid transfers within its step."""
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        yield


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
    with _while_tracing():
        point = jax.tree.map(_small, params)
        nothing = _scaled(point, 0.0)
        fresh = transform.init(nothing)
    state = share_step_count(fresh, opt_state)
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    updates = _update(transform, _shaped(shapes), point, state, nothing)
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
    floats = filter_inexact(params)
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with _while_tracing():
        update = functools.partial(_update, transform, _shaped(shapes))
    used = depends_on(update, floats, opt_state, floats, jnp.zeros(()))
    with _while_tracing():
        if used[-1]:
            _refuse_values_of_the_loss(transform, update, floats)
        if not any(used[-1 - len(jax.tree.leaves(floats)) : -1]):
            return True
        return _probe(transform, update, floats)


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
    floats = filter_inexact(params)
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with _while_tracing():
        update = functools.partial(_update, transform, _shaped(shapes))
    used = depends_on(update, floats, opt_state, floats, jnp.zeros(()))
    if not any(used[-1 - len(jax.tree.leaves(floats)) : -1]):
        return False
    with _while_tracing():
        point = jax.tree.map(_small, floats)
        nothing, twice = _scaled(point, 0.0), _scaled(point, 2.0)
        states = [transform.init(start) for start in (point, twice)]
        if not _near(*map(_floats, states)):
            return False  # it remembers where it was: a distance, an average
        for step in _STEPS:
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
    floats = filter_inexact(params)
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with _while_tracing():
        update = functools.partial(_update, transform, _shaped(shapes))
    used = depends_on(update, floats, opt_state, floats, jnp.zeros(()))
    looks = any(used[-1 - len(jax.tree.leaves(floats)) : -1])
    if used[-1] or not looks or not is_linear(transform, params, outer_params):
        return None
    with _while_tracing():
        point = jax.tree.map(_small, floats)
        nothing = _scaled(point, 0.0)
        for step in _STEPS:
            state = _at_step(transform.init(point), step)
            pull, push = update(nothing, state, point), update(point, state, nothing)
            doubled = update(nothing, state, _scaled(point, 2.0))
            if _largest(pull) > 0 and _near(doubled, _scaled(pull, 2.0)):
                return jax.tree.map(_rate, pull, push)
    return None


def _rate(pull: jax.Array, push: jax.Array) -> float:
    size = _largest(push)
    return _largest(pull) / size if size else 0.0


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
    with _while_tracing():
        small = jax.tree.map(_small, filter_inexact(params))
        fresh = transform.init(small)
    if scales_by_parameters(transform, fresh, small, outer_params):
        return False
    shapes = jax.eval_shape(lambda tree: tree, outer_params)
    with _while_tracing():
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
        if not _finite((pull, push)):  # 0 / 0: no gradient yet, no step
            continue
        if _near(pull, nothing) and _near(push, nothing):
            off_grid = jax.tree.map(
                lambda p: jnp.asarray(np.asarray(p) + np.asarray(_OFF_GRID, p.dtype)), point
            )
            rounded, bounded = still(off_grid), still(_scaled(point, _FAR))
            if _largest(rounded) > _NOISE or _largest(bounded) > 1.0:
                raise ValueError(_CONSTRAINT)
            continue
        odd, twice = _near(push, _scaled(pull, -1.0)), still(_scaled(point, 2.0))
        once, doubled = (at(step, _scaled(point, scale), nothing) for scale in (1.0, 2.0))
        if odd and _near(twice, _scaled(pull, 2.0)):
            decays = True
            normalises |= not _near(doubled, _scaled(once, 2.0))
        # Decay in front of a normaliser pulls as a gradient does; a proximal step does not.
        elif not (odd and _near(twice, pull) and _near(*map(_sizes, (once, pull)))):
            raise ValueError(_CONSTRAINT)
    from_zero, from_point = (
        max(_largest(at(step, point, start)) for step in _STEPS) for start in (nothing, point)
    )
    if from_zero <= _NO_STEP * from_point:
        raise ValueError(
            "inner takes steps in proportion to the parameters (Fromage), and v starts at 0, where "
            "it would stay: pass adjoint=, e.g. optax.adam"
        )
    return not (decays and normalises)


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
