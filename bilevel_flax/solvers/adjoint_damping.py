"""What keeps the adjoint v in bounds: damping of its system, given or by the residual; a length."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax.base import PyTree
from bilevel_flax.solvers.adjoint_moves import direction_length, from_plan, plan_of
from bilevel_flax.tree import norm, ratio

# δ between 1e-26 and 1e26: ρδ stays a float32.
_LOG_LIMIT = 60.0
# Of the first ‖Hv‖ / ‖v‖: where that falls below, v lies in directions without curvature.
_FLAT = 1e-4


def needed(extra_args: dict, *names: str) -> list:
    """Extra arguments of an `update` that a single-loop solver passes."""
    missing = [name for name in names if name not in extra_args]
    if missing:
        raise TypeError(
            f"an optimiser of v lacks {', '.join(missing)}: use it as the adjoint= of a "
            "single-loop solver, which passes them"
        )
    return [extra_args[name] for name in names]


def damped(
    transform: optax.GradientTransformation, damping: float
) -> optax.GradientTransformationExtraArgs:
    """Feeds D_v + δv to an optimiser of v: it solves (H + δI)v = -∇₁F.

    Args:
        transform: the optimiser; its state is kept as it is.
        damping: δ >= 0, in units of H; 0 is the exact adjoint.

    Raises:
        ValueError: δ is negative.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> adjoint = bf.adjoint.damped(optax.sgd(0.1), damping=0.5)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), adjoint=adjoint, outer=optax.sgd(0.1))
    """
    checks.optimizer("transform", transform)
    checks.at_least("damping", damping)
    step = optax.with_extra_args_support(transform)

    def update(updates, state, params=None, **extra_args):
        updates = jax.tree.map(lambda d, v: d + jnp.asarray(damping, d.dtype) * v, updates, params)
        return step.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update)


class SelfDampedState(NamedTuple):
    """State of `self_damped`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> state = bf.adjoint.self_damped(optax.sgd(0.1), initial=1.0).init(jnp.zeros(2))
        >>> float(jnp.exp(state.log_damping))
        1.0
    """

    log_damping: jax.Array  # float32, log of δ / unit
    unit: jax.Array  # float32, ‖Hv‖ / ‖v‖ when it was first known; 0 until then
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
    δ is about ‖Hv‖ / ‖v‖. Where H is singular ∇₁F may have a part that no v can meet, and v would
    grow along it until its other digits are lost: what ‖Hv‖ / ‖v‖ lacks of 1e-4 of what it was
    first is added to δ (D_x needs none of that part of v).

    Args:
        transform: the optimiser; it sees D_v.
        target: r to hold, > 1.
        rate: η, in (0, 1].
        initial: δ to start from, > 0. It need not be known: a factor of 10 off costs some 200
            steps from above, fewer from below. In units of the first ‖Hv‖ / ‖v‖ where `update` is
            handed `adjoint_product` (‖Hv‖), as it is by `single_loop`: δ is then a multiple of G.

    Returns:
        A transformation whose `update` needs the extra argument `adjoint_residual`, as
        `single_loop` hands it on; where that is not finite (F without a gradient), δ stays.

    Raises:
        ValueError: an argument out of range.
        TypeError: from `update`, without the extra argument.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> adjoint = bf.adjoint.self_damped(optax.sgd(0.1))
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), adjoint=adjoint, outer=optax.sgd(0.1))

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
    inner_plan = plan_of(transform)

    def init(params):
        log_damping = jnp.log(jnp.float32(initial))
        return SelfDampedState(log_damping, jnp.zeros((), jnp.float32), transform.init(params))

    def plan(updates, state, params=None, **extra_args):
        (residual,) = needed(extra_args, "adjoint_residual")
        product = extra_args.get("adjoint_product")
        unit, pull = jnp.float32(1.0), 0.0
        if product is not None:
            size = norm(params)
            curvature = jnp.where(size > 0, ratio(product, size), 0.0).astype(jnp.float32)
            unit = jnp.where(state.unit > 0, state.unit, curvature)
            pull = jnp.where(size > 0, jnp.maximum(_FLAT * unit - curvature, 0.0), 0.0)
            extra_args["adjoint_product"] = jnp.maximum(
                product, (pull * size).astype(product.dtype)
            )
        move, inner = inner_plan(updates, state.inner, params, **extra_args)
        # Momentum goes on where D_v is 0, and says nothing about ρ there.
        length = direction_length(updates, extra_args)
        rho = jnp.where(length > 0, ratio(move.factor * move.length, length), 0.0)
        move = move.shortened(1 / (1 + rho * (unit * jnp.exp(state.log_damping) + pull)))
        usable = jnp.isfinite(residual) & (residual > 0)
        excess = jnp.log(jnp.where(usable, residual, target).astype(jnp.float32) / target)
        excess = jnp.where(residual == 0, -1.0, jnp.clip(excess, -1.0, 1.0))
        most = jnp.float32(_LOG_LIMIT)
        log_damping = jnp.clip(state.log_damping + rate * excess, -most, most)
        return move, SelfDampedState(log_damping, unit, inner)

    return from_plan(init, plan)


def bounded(
    transform: optax.GradientTransformation, limit: float
) -> optax.GradientTransformationExtraArgs:
    """Keeps ‖v‖ <= limit by shortening v where v and its step together are longer.

    Plain SGD on v diverges where the step exceeds 2 over the largest curvature; z bends away from
    such directions, v, which lives in a linear system, cannot.

    Args:
        transform: the optimiser of v; its state is kept as it is.
        limit: far above what a healthy run reaches.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> adjoint = bf.adjoint.bounded(optax.sgd(0.1), limit=1e6)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), adjoint=adjoint, outer=optax.sgd(0.1))
    """
    if not limit > 0:
        raise ValueError(f"limit={limit} must be positive")
    inner_plan = plan_of(transform)

    def plan(updates, state, params=None, **extra_args):
        move, state = inner_plan(updates, state, params, **extra_args)
        length = move.keep * norm(params) + move.factor * move.length  # of v⁺, at most
        return move.shortened(jnp.where(length > limit, limit / length, 1.0)), state

    return from_plan(transform.init, plan)
