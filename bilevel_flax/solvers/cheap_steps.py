"""Cheaper steps: x and v less often, v less often than x, or both on a part of the minibatch.

Every direction is linear in the losses, so leaving out and parts of a minibatch are unbiased:

* `fraction=s`: D_v and D_x on the share s of the examples. The block of the minibatch is drawn anew
  in each update, so that every row of x is visited.
* `every=k`: v and x move in every k-th step.
* `adjoint_every=m`: v, a slow average, moves in every m-th of these only. D_x in the others needs
  no Hv: it is the slope of G along v, a forward tangent (`oracles/forward.py`).

One step costs, with c = 2/3 where x enters after the network, as weights of examples do (up to 2
for other x),

    1 + (3 s + c (m - 1)) / (k m)      gradient units

z's gradient always uses the whole minibatch. What does not move in a step stands still bit for bit,
the state of its optimiser included.

Only for estimators without memory: SABA's and SRBA's variance reduction compares visits of one and
the same minibatch, and a block drawn anew adds noise that it cannot remove.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Estimator, Oracles, Variables
from bilevel_flax.oracles.evaluate import residual
from bilevel_flax.solvers.soba import directions
from bilevel_flax.solvers.soba import estimator as plain

_STREAM = 7  # keeps the blocks apart from a run's other draws


class ThriftyState(NamedTuple):
    """Estimator state of `estimator`."""

    count: jax.Array  # int32, steps taken
    outer_loss: jax.Array  # float32, F when it was last evaluated
    residual: jax.Array  # float32, the adjoint's when it was last evaluated


def parts_of(fraction: float) -> int:
    """The number of blocks, 1 / fraction.

    Raises:
        ValueError: `fraction` is not 1/m for an integer m >= 1.
    """
    parts = round(1 / fraction) if 0 < fraction <= 1 else 0
    if not parts or abs(parts * fraction - 1) > 1e-6:
        raise ValueError(f"fraction={fraction} must be 1/m for an integer m >= 1, e.g. 0.5 or 0.25")
    return parts


def _checked(every: int, name: str = "every") -> int:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"{name}={every!r} must be an integer >= 1")
    return every


def units(fraction: float = 1.0, every: int = 1, adjoint_every: int = 1) -> float:
    """Gradient units of a step, on average, where x is weights of examples.

    Raises:
        ValueError: an argument out of range, or `fraction` together with `adjoint_every`.
    """
    k, m = _checked(every), _checked(adjoint_every, "adjoint_every")
    parts = parts_of(fraction)
    if parts > 1 and m > 1:
        raise ValueError(
            f"fraction={fraction} with adjoint_every={m}: x would move by a part of the minibatch "
            "in some steps and by all of it in others; choose one of the two"
        )
    return 1.0 + (3.0 / parts + (oracles.FORWARD_UNITS - 1) * (m - 1)) / (k * m)


def estimator(fraction: float = 1.0, every: int = 1, adjoint_every: int = 1) -> Estimator:
    """SOBA's directions, those of v (and x) less often or on less.

    Args:
        fraction: s = 1/m; the minibatches' leading lengths must be divisible by m.
        every: k >= 1. In the steps between, D_v and D_x are 0.
        adjoint_every: m >= 1. In the updates between, D_v is 0.

    Raises:
        ValueError: an argument out of range, or `fraction` together with `adjoint_every`; at trace
            time a minibatch that m does not divide.
    """
    cost, parts = units(fraction, every, adjoint_every), parts_of(fraction)
    if parts == every == adjoint_every == 1:
        return plain()

    def init(variables):
        del variables
        return ThriftyState(jnp.int32(0), jnp.float32(jnp.nan), jnp.float32(1.0))

    def everything(oracle, variables, batch, state):
        del batch
        evaluate = oracles.evaluate_all
        if parts > 1:
            key = jax.random.fold_in(jax.random.PRNGKey(_STREAM), state.count)
            block = jax.random.randint(key, (), 0, parts)
            evaluate = functools.partial(oracles.evaluate_block, block=block, parts=parts)
        found = oracle(variables, evaluate, combine=directions)
        now = residual(found.oracles) if found.residual is None else found.residual
        now = now.astype(jnp.float32)
        # A block of padding alone has no ∇₁F to compare with.
        now = jnp.where(jnp.isfinite(now), now, state.residual)
        loss = found.outer_loss.astype(jnp.float32)
        found = found._replace(outer_loss=loss, residual=now)
        return found.directions, ThriftyState(state.count + 1, loss, now), found

    def less(evaluate, combine, oracle, variables, batch, state):
        del batch
        found = oracle(variables, evaluate, combine=combine)
        found = found._replace(outer_loss=state.outer_loss, residual=state.residual)
        return found.directions, state._replace(count=state.count + 1), found

    z_alone = functools.partial(less, oracles.evaluate_inner, _z_alone)
    z_and_x = functools.partial(less, oracles.evaluate_forward, _z_and_x)
    # How often each kind of step is due, the longest period last; equal periods leave one kind.
    periods = {1: z_alone, every: z_and_x, every * adjoint_every: everything}

    def stage(state):
        longer = jnp.array(list(periods)[1:], jnp.int32)
        return jnp.sum(state.count % longer == 0)

    *less_often, update = periods.values()
    return Estimator(init=init, update=update, less=tuple(less_often), stage=stage, units=cost)


def _z_alone(found: Oracles) -> Variables:
    return Variables(found.inner_grad, None, None)


def _z_and_x(found: Oracles) -> Variables:
    return Variables(found.inner_grad, None, rows.add(found.cross_jvp, found.outer_grad_outer))


def clocked(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A copy of z's transformation that counts with it: one schedule, steps left out or not.

    Args:
        transform: z's; `update` needs the extra argument `inner_opt_state`, whose integer leaves
            take the place of its own.
    """
    step = optax.with_extra_args_support(transform)

    def update(updates, state, params=None, **extra_args):
        state = jax.tree.map(
            lambda own, z: own if oracles.is_inexact(own) else z,
            state,
            extra_args["inner_opt_state"],
        )
        return step.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update)
