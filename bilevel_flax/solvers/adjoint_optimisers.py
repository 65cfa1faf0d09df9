"""Optimisers of the adjoint v that are made from z's: nothing about v is left to choose.

v solves a linear system in the Hessian that z's optimiser copes with, so v wants z's schedule,
momentum and preconditioner: it takes z's transformation, with statistics of its own. Its fixed
point is v* whatever the preconditioner, and where D_v explodes its own statistics see that.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax.base import PyTree
from bilevel_flax.solvers.adjoint_damping import (
    SelfDampedState,
    bounded,
    damped,
    needed,
    self_damped,
)
from bilevel_flax.solvers.adjoint_moves import Move, direction_length, from_plan, plan_of
from bilevel_flax.solvers.inner_optimiser import share_step_count
from bilevel_flax.solvers.optimiser_probes import (
    applies_to_adjoint,
    coupled_decay,
    is_linear,
    scales_by_parameters,
)
from bilevel_flax.solvers.step import tolerant
from bilevel_flax.tree import norm, wide

__all__ = [
    "OwnUnitsState",
    "SelfDampedState",
    "bounded",
    "damped",
    "in_own_units",
    "like_inner_optimizer",
    "scale_free_like",
    "self_damped",
]

# Running means: of what gives D_v its unit, as slow as Adam's; of what gives v's step its length.
_SLOW, _FAST = 0.999, 0.9
_FASTEST = 5.0  # steps of v
_MEMORY = 10.0  # for the longest step, in time constants of v
# Squares of H times a probe stay in float32 for curvatures between 1e-7 and 1e7.
_PROBE = 1e-12
_SHARE = 1e-3


def like_inner_optimizer(
    inner: optax.GradientTransformation, *, decays: bool = True, sizes_of_z: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Z's transformation for v, with statistics of its own.

    Its schedules count z's steps, and hyperparameters that somebody writes into z's state
    (`optax.inject_hyperparams`) hold for v as well. What it does to parameters by their values is
    left out where it has no meaning for v (`optimiser_probes.applies_to_adjoint`); where their size
    gives the step its length (LAMB), v's is that of z.

    Args:
        inner: z's optimiser.
        decays: weight decay in front of its step is added to D_v here; False: D_v has it already.
        sizes_of_z: False: where the size of parameters gives the step its length, it is 1 for every
            parameter (z that passes through 0 would stop v).

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
        opt_state, z = needed(extra_args, "inner_opt_state", "inner_params")
        about = step, opt_state, z, extra_args.get("outer_params")
        if not applies_to_adjoint(*about) or not (decays or coupled_decay(*about) is None):
            params = jax.tree.map(jnp.zeros_like, params)
        elif scales_by_parameters(*about):
            params = z if sizes_of_z else jax.tree.map(jnp.ones_like, z)
        try:
            return step.update(updates, share_step_count(state, opt_state), params, **extra_args)
        except TypeError as error:
            if "value_fn" not in str(error):
                raise
            raise ValueError(
                "inner searches along a line for a lower loss, and v, which would do the same, "
                "minimises none: pass adjoint=, e.g. optax.adam"
            ) from error

    return optax.GradientTransformationExtraArgs(step.init, update)


class OwnUnitsState(NamedTuple):
    """State of `in_own_units`; scalars are float32.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> state = bf.adjoint.in_own_units(optax.adam(1e-3)).init(jnp.zeros(2))
        >>> int(state.count)
        0
    """

    count: jax.Array  # int32, steps taken
    size: jax.Array  # running mean of ‖D_v‖
    product: jax.Array  # running mean of ‖Hv‖
    length: jax.Array  # the same of ‖v‖
    residual: jax.Array  # running mean of the adjoint's, at most 1
    longest: jax.Array  # of the transformation's last steps
    inner: PyTree  # the state of the transformation


def in_own_units(
    transform: optax.GradientTransformation, *, time_constant: float = 100.0
) -> optax.GradientTransformationExtraArgs:
    """Steps of v whose length does not depend on the units of F and G.

    Adam and its like step by their learning rate, in units of z, whatever the gradient. V has other
    units: those of z times F / G. So here the transformation U gives the step's direction, and the
    part of its longest step that this one has (how far gradients agree); gradient descent gives
    the length (grafting):

        v -= ‖D_v‖ / (κ τ r) · U / max ‖U‖        κ = ‖Hv‖ / ‖v‖

    with r the running adjoint residual, at most 1: where noise keeps it there, v is a slow average,
    and where v can be solved for, it is fast. The maximum forgets within some 10 τ r steps: z's
    steps may fall to 0, but v must go on to follow z and x until they rest.

    A multiple of F is one of v, and of G one of 1/v, exactly. D_v is handed on in units of its
    running norm, so that the same holds for clips and ε.

    Args:
        transform: any optimiser that is not linear in the gradient.
        time_constant: τ, steps of v; τ r is never below 5, for the sake of momentum.

    Returns:
        A transformation whose `update` needs the extra arguments `adjoint_product` (‖Hv‖) and
        `adjoint_residual`, as `single_loop` hands them on.

    Raises:
        ValueError: `time_constant` is below 1.
        TypeError: from `update`, without the extra arguments.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> adjoint = bf.adjoint.in_own_units(optax.adam(1e-3))
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), adjoint=adjoint, outer=optax.sgd(0.1))

    References:
        N. Agarwal, R. Anil, E. Hazan, T. Koren, C. Zhang. Disentangling adaptive gradient methods
        from learning rates. arXiv 2020.
    """
    if not time_constant >= 1:
        raise ValueError(f"time_constant={time_constant} must be >= 1")
    step = optax.with_extra_args_support(transform)

    def init(params):
        size, product, length, longest = (jnp.zeros((), jnp.float32) for _ in range(4))
        means = size, product, length, jnp.float32(1.0)
        return OwnUnitsState(jnp.int32(0), *means, longest, step.init(params))

    def plan(updates, state, params=None, **extra_args):
        product, residual = needed(extra_args, "adjoint_product", "adjoint_residual")
        count = jnp.asarray(optax.safe_increment(state.count))

        def running(old, new, decay):
            return decay * old + (1 - decay) * new.astype(jnp.float32)

        now = direction_length(updates, extra_args)
        size = running(state.size, now, _SLOW)
        unit = size / (1 - _SLOW ** count.astype(jnp.float32))
        length = running(state.length, norm(params), _FAST)
        # H·0 is 0: what a difference of gradients makes of it is rounding, and no curvature.
        product = running(state.product, jnp.where(norm(params) > 0, product, 0.0), _FAST)
        residual = jnp.minimum(jnp.nan_to_num(residual, nan=1.0), 1.0)
        residual = running(state.residual, residual, _FAST)
        steps = jnp.maximum(time_constant * residual, jnp.minimum(time_constant, _FASTEST))
        scaled = functools.partial(_times, 1 / jnp.where(unit > 0, unit, 1.0))
        moved, inner = step.update(scaled(updates), state.inner, scaled(params), **extra_args)
        length_of_step = norm(moved)
        own = length_of_step.astype(jnp.float32)  # as it was, where z is float64
        # What a schedule or an accumulator took from z's steps long ago is nothing to v.
        longest = jnp.maximum((1 - 1 / (_MEMORY * steps)) * state.longest, own)
        # Of small D_v a larger share: the square of v itself must be a float32.
        probe = jnp.maximum(_PROBE * now, jnp.minimum(_SHARE * now, _PROBE))
        # And in float16 its entries must be numbers at all.
        probe = jnp.maximum(probe, _least(updates))
        # ‖D_v‖ / κ; at v = 0 nothing is known of κ, and a step too short to matter will tell.
        far = jnp.where(
            product > 0,
            now * length / jnp.where(product > 0, product * steps, 1.0),
            jnp.maximum(probe, length),
        )
        factor = far / jnp.where(longest > 0, longest, 1.0)
        state = OwnUnitsState(count, size, product, length, residual, longest, inner)
        return Move(jnp.float32(1.0), factor, moved, length_of_step), state

    return from_plan(init, plan)


def _least(tree: PyTree) -> float:
    """The norm of a tree of the least normal numbers of its dtypes."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * float(jnp.finfo(leaf.dtype).tiny) ** 2 for leaf in leaves) ** 0.5


def _times(factor: jax.Array, tree: PyTree) -> PyTree:
    # In the wider dtype of the two: what scales a unit away may itself be no float16.
    return jax.tree.map(
        lambda leaf: (factor * leaf.astype(wide(leaf.dtype))).astype(leaf.dtype), tree
    )


def scale_free_like(
    inner: optax.GradientTransformation, *, time_constant: float = 100.0
) -> optax.GradientTransformationExtraArgs:
    """`like_inner_optimizer`; where that is not linear in the gradient, `in_own_units`.

    So v is a multiple of F, whatever z's optimiser.

    Args:
        inner: z's optimiser.
        time_constant: as in `in_own_units`.

    Raises:
        ValueError: from `init`, for `optax.contrib.mechanize`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> inner = optax.adamw(1e-3)
        >>> adjoint = bf.adjoint.scale_free_like(inner)
        >>> solver = bf.soba(problem, inner=inner, adjoint=adjoint, outer=optax.sgd(0.1))
    """
    plain = like_inner_optimizer(inner)
    directions = like_inner_optimizer(inner, sizes_of_z=False)
    grafted = in_own_units(directions, time_constant=time_constant)
    of_inner = tolerant(inner)

    def init(params):
        if is_linear(of_inner, params):
            return plain.init(params)
        state = grafted.init(params)
        contrib: Any = sys.modules.get("optax.contrib")  # not imported: no state of it
        is_tuner = lambda node: contrib is not None and isinstance(node, contrib.MechanicState)
        if any(map(is_tuner, jax.tree.leaves(state, is_leaf=is_tuner))):
            raise ValueError(
                "inner=mechanize(...) tunes its step to where parameters have gone, and v, whose "
                "solution moves with x, stops for long: pass adjoint=, e.g. the optimiser in it"
            )
        return state

    def plan(updates, state, params=None, **extra_args):
        step = grafted if isinstance(state, OwnUnitsState) else plain
        return plan_of(step)(updates, state, params, **extra_args)

    return from_plan(init, plan)
