"""Optimisers of the adjoint v that are made from z's: nothing about v is left to choose.

v solves a linear system in the Hessian that z's optimiser copes with, so v wants z's schedule,
momentum and preconditioner: it takes z's transformation, with statistics of its own. Its fixed
point is v* whatever the preconditioner, and where D_v explodes its own statistics see that.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax.base import PyTree
from bilevel_flax.solvers.inner_optimiser import applies_to_adjoint
from bilevel_flax.solvers.step import tolerant
from bilevel_flax.tree import norm, ratio

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)

# δ between 1e-26 and 1e26: ρδ stays a float32.
_LOG_LIMIT = 60.0


def _needed(extra_args: dict, *names: str) -> list:
    missing = [name for name in names if name not in extra_args]
    if missing:
        raise TypeError(
            f"an optimiser of v lacks {', '.join(missing)}: use it as the adjoint= of a "
            "single-loop solver, which passes them"
        )
    return [extra_args[name] for name in names]


def like_inner_optimizer(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Z's transformation for v, with statistics of its own.

    Its schedules count z's steps, and hyperparameters that somebody writes into z's state
    (`optax.inject_hyperparams`) hold for v as well. What it does to parameters by their values is
    left out where it has no meaning for v (`inner_optimiser.applies_to_adjoint`).

    Args:
        inner: z's optimiser.

    Returns:
        A transformation whose `update` needs the extra arguments `inner_opt_state` and
        `inner_params`, as `single_loop` hands them on.

    Raises:
        TypeError: from `update`, without these extra arguments.
        ValueError: from `update`, where `inner` projects or clips parameters.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> inner = optax.sgd(0.1)
        >>> z, v = jnp.ones(2), jnp.zeros(2)
        >>> adjoint = like_inner_optimizer(inner)
        >>> update, _ = adjoint.update(
        ...     jnp.array([1.0, -2.0]), adjoint.init(v), v,
        ...     inner_opt_state=inner.init(z), inner_params=z,
        ... )
        >>> [round(float(value), 3) for value in update]
        [-0.1, 0.2]
    """
    checks.optimizer("inner", inner)
    step = tolerant(inner)

    def update(updates, state, params=None, **extra_args):
        opt_state, z = _needed(extra_args, "inner_opt_state", "inner_params")
        if not applies_to_adjoint(inner, opt_state, z, extra_args.get("outer_params")):
            params = jax.tree.map(jnp.zeros_like, params)
        return step.update(updates, share_step_count(state, opt_state), params, **extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update)


def share_step_count(state: PyTree, inner_opt_state: PyTree) -> PyTree:
    """V's optimiser state with z's clock in its schedules, and z's injected hyperparameters.

    Other counters stay its own: where v moves in every k-th step only, an optimiser that acts in
    every k-th of its calls (`optax.MultiSteps`) would never act on z's.
    """

    def shared(own, of_z):
        if isinstance(own, optax.ScaleByScheduleState):
            return of_z
        if isinstance(own, _INJECTED):
            return of_z._replace(inner_state=share_step_count(own.inner_state, of_z.inner_state))
        return own

    kinds = (optax.ScaleByScheduleState, *_INJECTED)
    is_leaf = lambda node: isinstance(node, kinds)
    return jax.tree.map(shared, state, inner_opt_state, is_leaf=is_leaf)


def damped(
    transform: optax.GradientTransformation, damping: float
) -> optax.GradientTransformationExtraArgs:
    """Feeds D_v + δv to an optimiser of v: it solves (H + δI)v = -∇₁F.

    Args:
        transform: the optimiser; its state is kept as it is.
        damping: δ >= 0, in units of H; 0 is the exact adjoint.

    Raises:
        ValueError: δ is negative.
    """
    if damping < 0:
        raise ValueError(f"damping={damping} must be >= 0")
    step = optax.with_extra_args_support(transform)

    def update(updates, state, params=None, **extra_args):
        updates = jax.tree.map(lambda d, v: d + jnp.asarray(damping, d.dtype) * v, updates, params)
        return step.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update)


class SelfDampedState(NamedTuple):
    """State of `self_damped`."""

    log_damping: jax.Array  # float32, log δ
    inner: PyTree  # the state of the transformation


def self_damped(
    transform: optax.GradientTransformation,
    *,
    target: float = 1.1,
    rate: float = 0.1,
    initial: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Damps v's system by a δ that the adjoint's residual asks for: (H + δI)v = -∇₁F.

    With U the optimiser's step along D_v, the damping is a backward Euler step of it,

        v⁺ = (v + U) / (1 + ρδ)        ρ = ‖U‖ / ‖D_v‖

    so that no δ makes v unstable where U alone is stable, however long z's steps are.

    At v = 0 the residual r = ‖Hv + ∇₁F‖ / ‖∇₁F‖ of a minibatch is 1. Above, v makes things worse:
    the noise of Hv, or negative curvature, has the better of it, and δ grows; below, δ falls:

        log δ += η · clip(log(r / target), ±1)

    A noiseless convex problem drives δ to 0, and v to the exact adjoint; deep networks end where
    δ is about ‖Hv‖ / ‖v‖.

    Args:
        transform: the optimiser; it sees D_v.
        target: r to hold, > 1.
        rate: η, in (0, 1].
        initial: δ to start from, > 0. It need not be known: a factor of 10 off costs some 200
            steps from above, fewer from below.

    Returns:
        A transformation whose `update` needs the extra argument `adjoint_residual`, as
        `single_loop` hands it on; where that is not finite (F without a gradient), δ stays.

    Raises:
        ValueError: an argument out of range.
        TypeError: from `update`, without the extra argument.

    References:
        J. Martens. Deep learning via Hessian-free optimization. ICML 2010 (damping that follows
        the model's quality, there by the reduction ratio).
    """
    if not target > 1:
        raise ValueError(f"target={target} must be > 1: at v = 0 the residual is 1")
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} must lie in (0, 1]")
    if not initial > 0:
        raise ValueError(f"initial={initial} must be > 0")
    step = optax.with_extra_args_support(transform)

    def init(params):
        return SelfDampedState(jnp.log(jnp.float32(initial)), step.init(params))

    def update(updates, state, params=None, **extra_args):
        (residual,) = _needed(extra_args, "adjoint_residual")
        moved, inner = step.update(updates, state.inner, params, **extra_args)
        # Momentum goes on where D_v is 0, and says nothing about ρ there.
        length = norm(updates)
        rho = jnp.where(length > 0, ratio(norm(moved), length), 0.0)
        share = 1 - 1 / (1 + rho * jnp.exp(state.log_damping))

        def take_back(u, v):
            return u - share.astype(u.dtype) * (v + u)

        moved = jax.tree.map(take_back, moved, params)
        usable = jnp.isfinite(residual) & (residual > 0)
        excess = jnp.log(jnp.where(usable, residual, target).astype(jnp.float32) / target)
        excess = jnp.where(residual == 0, -1.0, jnp.clip(excess, -1.0, 1.0))
        most = jnp.float32(_LOG_LIMIT)
        log_damping = jnp.clip(state.log_damping + rate * excess, -most, most)
        return moved, SelfDampedState(log_damping, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def bounded(
    transform: optax.GradientTransformation, limit: float
) -> optax.GradientTransformationExtraArgs:
    """Keeps ‖v‖ <= limit · (1 + ‖z‖) by shortening v.

    Plain SGD on v diverges where the step exceeds 2 over the largest curvature; z bends away from
    such directions, v, which lives in a linear system, cannot.

    Args:
        transform: the optimiser of v; its state is kept as it is.
        limit: far above what a healthy run reaches.
    """
    if not limit > 0:
        raise ValueError(f"limit={limit} must be positive")
    step = optax.with_extra_args_support(transform)

    def update(updates, state, params=None, **extra_args):
        (z,) = _needed(extra_args, "inner_params")
        moved, state = step.update(updates, state, params, **extra_args)
        length = norm(jax.tree.map(jnp.add, params, moved))
        most = limit * (1 + norm(z))
        shrink = jnp.where(length > most, most / length, 1.0)

        def shorten(u, v):
            s = shrink.astype(u.dtype)
            return jnp.where(length > most, s * (v + u) - v, u)

        return jax.tree.map(shorten, moved, params), state

    return optax.GradientTransformationExtraArgs(step.init, update)
