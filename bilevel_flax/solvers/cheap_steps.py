"""Cheaper steps: x and v less often, v less often than x, or both on a part of the minibatch.

Every direction is linear in the losses, so leaving out and parts of a minibatch are unbiased:

* `subsample=s`: D_v and D_x on the share s of the examples. The block of the minibatch is drawn
  anew in each update, so that every row of x is visited.
* `update_every=k`: v and x move in one of every k steps, drawn anew each time: minibatches that
  come in a fixed order would else meet the same ones for ever, and half of x's rows none.
* `adjoint_update_every=m`: v, a slow average, moves in every m-th of these only. D_x in the others
  needs no Hv: it is the slope of G along v, a forward tangent (`oracles.inner_grad_and_cross`).

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

from bilevel_flax import oracles
from bilevel_flax.base import Estimate, Estimator
from bilevel_flax.checks import as_count
from bilevel_flax.oracles.derivatives import FORWARD_UNITS
from bilevel_flax.solvers.soba import estimator as every_step
from bilevel_flax.solvers.step import direction_norms, switch_updates

_BLOCKS, _TURNS = 7, 8  # keep these draws apart from a run's others


class CheapStepsState(NamedTuple):
    """Estimator state of `estimator`."""

    count: jax.Array  # int32, steps taken
    outer_loss: jax.Array  # float32, F when it was last evaluated
    residual: jax.Array  # float32, the adjoint's when it was last evaluated


def parts_of(subsample: float) -> int:
    """The number of blocks, 1 / subsample.

    Raises:
        ValueError: `subsample` is not 1/m for an integer m >= 1.
    """
    parts = round(1 / subsample) if 0 < subsample <= 1 else 0
    if not parts or abs(parts * subsample - 1) > 1e-6:
        raise ValueError(
            f"subsample={subsample} must be 1/m for an integer m >= 1, e.g. 0.5 or 0.25"
        )
    return parts


def units(
    subsample: float = 1.0,
    update_every: int = 1,
    adjoint_update_every: int = 1,
    cooldown: float = 0.0,
) -> float:
    """Gradient units of a step, on average over the run, where x is weights of examples.

    Raises:
        ValueError: an argument out of range, or `subsample` together with `adjoint_update_every`.
    """
    k = as_count("update_every", update_every)
    m = as_count("adjoint_update_every", adjoint_update_every)
    parts = parts_of(subsample)
    if parts > 1 and m > 1:
        raise ValueError(
            f"subsample={subsample} with adjoint_update_every={m}: x would move by a part of the "
            "minibatch in some steps and by all of it in others; choose one of the two"
        )
    return 1.0 + (1 - cooldown) * (3.0 / parts + (FORWARD_UNITS - 1) * (m - 1)) / (k * m)


def estimator(
    subsample: float = 1.0,
    update_every: int = 1,
    adjoint_update_every: int = 1,
    *,
    cooldown: float = 0.0,
    steps: int = 0,
) -> Estimator:
    """SOBA's directions, those of v (and x) less often or on less.

    Args:
        subsample: s = 1/m; the minibatches' leading lengths must be divisible by m.
        update_every: k >= 1. In the other steps v and x stand still.
        adjoint_update_every: m >= 1. In the updates between, v stands still.
        cooldown: share of the run's steps, at its end, in which v and x stand still, in [0, 1).
        steps: of the run, where there is a cooldown.

    Raises:
        ValueError: an argument out of range, or `subsample` together with `adjoint_update_every`;
            at trace time a minibatch that m does not divide.
    """
    cost = units(subsample, update_every, adjoint_update_every, cooldown)
    parts, stop = parts_of(subsample), last_move(cooldown, steps)
    if parts == update_every == adjoint_update_every == 1 and not cooldown:
        return every_step()

    def init(variables):
        del variables
        # Step 0 evaluates everything, and so sets the loss.
        return CheapStepsState(jnp.int32(0), jnp.float32(0.0), jnp.float32(1.0))

    def everything(oracle, variables, state):
        evaluate = oracles.evaluate_all
        if parts > 1:
            key = jax.random.fold_in(jax.random.PRNGKey(_BLOCKS), state.count)
            block = jax.random.randint(key, (), 0, parts, jnp.int32)
            evaluate = functools.partial(oracles.evaluate_subsample, block=block, parts=parts)
        evaluation = oracle.directions(variables, evaluate)
        residual = evaluation.residual.astype(jnp.float32)
        # A block of padding alone has no ∇₁F to compare with.
        residual = jnp.where(jnp.isfinite(residual), residual, state.residual)
        loss = evaluation.outer_loss.astype(jnp.float32)
        return _estimate(evaluation, CheapStepsState(state.count + 1, loss, residual))

    def less(evaluate, oracle, variables, state):
        evaluation = oracle.directions(variables, evaluate)
        return _estimate(evaluation, state._replace(count=state.count + 1))

    z_alone = functools.partial(less, oracles.evaluate_inner)
    z_and_x = functools.partial(less, oracles.evaluate_without_hvp)
    # The kinds of steps, by how seldom they come; equal periods leave one kind.
    period = update_every * adjoint_update_every
    kinds = {1: z_alone, update_every: z_and_x, period: everything}
    resting = [z_alone] if cooldown and update_every == 1 else []  # else it is the first already

    def update(oracle, variables, batch, state):
        del batch
        turn, moves = state.count // update_every, moves_at(state.count, update_every)
        due = {1: False, update_every: moves, period: moves & (turn % adjoint_update_every == 0)}
        kind = sum(due[often].astype(jnp.int32) for often in list(kinds)[1:]) + jnp.int32(0)
        if cooldown:
            kind = jnp.where(state.count < stop, kind + len(resting), 0)
        steps_of = [*resting, *kinds.values()]
        return switch_updates(
            [functools.partial(step, oracle, variables, state) for step in steps_of], kind
        )

    return Estimator(init=init, update=update, units=cost)


def last_move(cooldown: float, steps: int) -> int:
    """The steps of a run in which v and x may move: what the cooldown leaves of it.

    Raises:
        ValueError: `cooldown` is outside [0, 1), or all of the run.
    """
    left = steps - int(cooldown * steps)
    if not 0 <= cooldown < 1 or (cooldown and left < 1):
        raise ValueError(
            f"cooldown={cooldown} must lie in [0, 1): the share of the {steps} steps at the end "
            "in which x stands still"
        )
    return left


def moves_at(count: jax.Array | int, update_every: int) -> jax.Array:
    """Whether x moves in step `count`: once in every `update_every` steps, at first in step 0."""
    turn = count // update_every
    key = jax.random.fold_in(jax.random.PRNGKey(_TURNS), turn)
    drawn = jax.random.randint(key, (), 0, update_every, jnp.int32)
    return jnp.asarray(count % update_every == jnp.where(turn == 0, 0, drawn))


def _estimate(evaluation: oracles.Evaluation, state: CheapStepsState) -> Estimate:
    # What is left out is 0: the variable that would ask for it rests.
    product, share = (
        jnp.float32(0.0) if value is None else value.astype(jnp.float32)
        for value in (evaluation.product, evaluation.through_inner)
    )
    evaluation = evaluation._replace(
        outer_loss=state.outer_loss,
        residual=state.residual,
        product=product,
        through_inner=share,
    )
    directions = evaluation.directions
    assert directions is not None
    return Estimate(directions, state, evaluation, direction_norms(directions))
