"""The defaults for deep networks: any inner optimiser goes in, nothing is left to tune.

SOBA's directions (see `solvers/soba.py`) with, each for a measured reason (`docs/auto.md`):

* v moved by z's own transformation, schedule included, with statistics of its own; where that is
  not linear in the gradient (Adam), in steps whose length has v's units, so that a multiple of F or
  of G changes nothing;
* x moved in units of x by `outer.robust_sgd`: neither the number of examples, the length of the
  run nor the scale of v matters, and no single example can make the others stand still;
* dense x no faster than z can follow (`optimisers/paced.py`);
* a step of x that falls linearly to 0 over the run, and needs the number of steps only;
* a damping of v that follows its residual: none where Hv is exact, enough where the noise of Hv
  or negative curvature has the better of it;
* ‖v‖ bounded, so that an inner step at the edge of stability stops v from growing, not the run;
* on request v and x in some of the steps only, or on a part of the minibatch (`cheap_steps.py`).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax.base import BilevelSolver, Estimator, Problem
from bilevel_flax.deprecated import renamed_arguments
from bilevel_flax.outer.optimisers.paced import paced
from bilevel_flax.outer.optimisers.robust import robust_sgd
from bilevel_flax.solvers import adjoint_optimisers, cheap_steps
from bilevel_flax.solvers.single_loop import single_loop

# Far above any healthy v, far below where squares of D_v overflow float32.
_ADJOINT_LIMIT = 1e12
# One visit, however few there are in the run, says no more than this about a row.
_LONGEST_VISIT = 1.0
# How far z may be behind dense x, as a share of the steps of x.
_LAG = 0.0025
# Steps over which v averages noise: shorter ones lost up to .16 of AUC in runs of 100 steps.
_TIME_CONSTANT = 100.0


def decay_to_zero(peak: float, steps: int, frozen: int = 0) -> optax.Schedule:
    """A step of x that is 0 for `frozen` steps, then falls linearly from `peak` to 0 at `steps`.

    Args:
        peak: the first step that is not 0.
        steps: the length of the run.
        frozen: warm-up of z and v, < `steps`.

    Example:
        >>> schedule = decay_to_zero(1.0, steps=10, frozen=5)
        >>> [float(schedule(t)) for t in (0, 5, 10, 11)]
        [0.0, 1.0, 0.0, 0.0]
    """

    def schedule(count):
        left = jnp.clip((steps - count) / (steps - frozen), 0.0, 1.0)
        return jnp.where(count < frozen, 0.0, peak * left)

    return schedule


@renamed_arguments(fraction="subsample", every="update_every", adjoint_every="adjoint_update_every")
def auto(
    problem: Problem,
    *,
    inner: optax.GradientTransformation | None,
    steps: int,
    learning_rate: float = 10.0,
    travel: float = 10.0,
    dense_learning_rate: float = 0.01,
    warmup: float = 0.0,
    cooldown: float = 0.0,
    damping: float | None = None,
    subsample: float = 1.0,
    update_every: int = 1,
    adjoint_update_every: int = 1,
    estimator: Estimator | None = None,
    outer: optax.GradientTransformation | None = None,
    adjoint: optax.GradientTransformation | None = None,
    inner_weights: Any = None,
    outer_weights: Any = None,
) -> BilevelSolver:
    """A bilevel solver without anything to tune: give it z's optimiser and the number of steps.

    Args:
        problem: the bilevel problem.
        inner: z's optimiser, as in a loop without hyperparameters; None: a host moves z, as in
            `Common`, and `adjoint` is required.
        steps: updates in the run; the step of x falls to 0 there.
        learning_rate: of per-sample leaves of x, in units of x: how far a typical entry would
            travel in the whole run with the step that it starts with, whatever the number of
            examples, of epochs and the minibatch. While visits agree the step grows.
        travel: in the same units, the limit of that: a learning rate above it counts as `travel`.
        dense_learning_rate: of the other leaves of x, which move in every step: at most, for they
            wait for z.
        warmup: share of the steps in which x stands still, in [0, 1).
        cooldown: share of the steps, at the end, in which x stands still again and costs nothing:
            z trains on with what was learned. The step of x has fallen to 0 where it begins.
        damping: δ >= 0, v solves (H + δI)v = -∇₁F; None: as the residual asks
            (`adjoint.self_damped`).
        subsample: share 1/m of the examples that D_v and D_x use.
        update_every: k, v and x move in one of every k steps.
        adjoint_update_every: m, v moves in every m-th of these only.
        estimator: takes the place of SOBA's, e.g. with memory; refused together with a cheaper
            step.
        outer: takes the place of x's optimiser.
        adjoint: takes the place of v's.
        inner_weights: as `single_loop`.
        outer_weights: as `single_loop`.

    Returns:
        A `BilevelSolver`; `units` is its cost, in gradient units a step (`cheap_steps.units`).

    Raises:
        ValueError: an argument out of range; `estimator` together with a cheaper step;
            `subsample` together with `adjoint_update_every`; at trace time `adjoint_update_every`
            for losses without forward mode.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.auto(problem, inner=optax.adam(0.1), steps=3000)
        >>> state = solver.init(jnp.zeros(3), jnp.ones(3))
        >>> update = jax.jit(solver.update)
        >>> for _ in range(3000):
        ...     state, info = update(state, bf.Batch(jnp.ones(3), jnp.full(3, 2.0)))
        >>> [round(float(value), 1) for value in state.outer_params]
        [2.0, 2.0, 2.0]

    References:
        M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that
        enables stochastic and global variance reduction algorithms. NeurIPS 2022.
    """
    steps = checks.as_count("steps", steps)
    checks.problem(problem)
    checks.host_moves_z(inner, adjoint)
    if inner is not None:
        checks.optimizer("inner", inner)
    checks.at_least("warmup", warmup)
    if not 0 <= warmup < 1:
        raise ValueError(
            f"warmup={warmup} must lie in [0, 1): the share of the steps with x frozen"
        )
    for name, value in (
        ("learning_rate", learning_rate),
        ("travel", travel),
        ("dense_learning_rate", dense_learning_rate),
    ):
        checks.at_least(name, value)
    moving = cheap_steps.last_move(cooldown, steps)
    cheaper = (subsample, update_every, adjoint_update_every)
    if estimator is None:
        estimator = cheap_steps.estimator(*cheaper, cooldown=cooldown, steps=steps)
    elif cheap_steps.units(*cheaper, cooldown) < 4:
        raise ValueError(
            f"subsample={subsample}, update_every={update_every}, adjoint_update_every="
            f"{adjoint_update_every}, cooldown={cooldown} with an estimator of your own: its "
            "memory cannot tell left out from zero; leave one of them out"
        )

    moves_v = adjoint
    if moves_v is None:
        assert inner is not None
        moves_v = adjoint_optimisers.scale_free_like(inner, time_constant=_TIME_CONSTANT)
    moves_v = adjoint_optimisers.bounded(moves_v, _ADJOINT_LIMIT)
    if damping is None:
        moves_v = adjoint_optimisers.self_damped(moves_v)
    else:
        moves_v = adjoint_optimisers.damped(moves_v, damping)
    if outer is None:
        moves, frozen = -(-moving // update_every), int(warmup * steps) // update_every
        if frozen >= moves:
            raise ValueError(
                f"warmup={warmup} and cooldown={cooldown} leave no steps in which x moves: their "
                "sum must stay below 1"
            )
        # The area under a triangle: what a row travels if all its visits agree.
        triangle = 2 / max(moves - frozen, 1)
        outer = robust_sgd(
            decay_to_zero(triangle * learning_rate, moves, frozen),
            max_learning_rate=decay_to_zero(triangle * travel, moves, frozen),
            dense_learning_rate=decay_to_zero(dense_learning_rate * update_every, moves, frozen),
            catch_up=_LONGEST_VISIT,
        )
        if inner is not None:  # how far z goes is else not known here
            outer = paced(outer, max_lag=_LAG * moves, update_every=update_every)
    return single_loop(
        problem,
        estimator,
        inner=inner,
        outer=outer,
        adjoint=moves_v,
        inner_weights=inner_weights,
        outer_weights=outer_weights,
        name="auto",
    )
