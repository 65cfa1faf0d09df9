"""The directions of a single-loop method alone, for a host that has optimisers of its own.

    D_z = ∇₁G        D_v = ∇²₁₁G v + ∇₁F        D_x = ∇²₂₁G v + ∇₂F

or an estimator's versions of them. `single_loop` is this and three Optax steps, so a host that
takes the same steps takes the same trajectory (in another program: up to how XLA fuses).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from bilevel_flax import checks
from bilevel_flax import per_sample as by_row
from bilevel_flax.base import (
    NEVER,
    Batch,
    Estimator,
    Info,
    Method,
    Problem,
    PyTree,
    Variables,
)
from bilevel_flax.solvers.binder import Binder
from bilevel_flax.solvers.initial_state import init_variables
from bilevel_flax.solvers.soba import estimator as of_minibatches
from bilevel_flax.solvers.step import (
    all_finite,
    make_info,
    mask_rows,
    norms_and_finite,
    rollback_unless,
)
from bilevel_flax.tree import copied


class HostState(struct.PyTreeNode):
    """What directions depend on: a `TrainState` without the states of optimisers.

    Attributes:
        step: int32 scalar, the calls so far; it is folded into the keys of a stateful problem.
        inner_params: z.
        adjoint: v, with z's tree, shapes, dtypes and shardings.
        outer_params: x.
        estimator_state: the estimator's memory.
        model_state: mutable model state, or None.
        rng: the run's key.
    """

    step: jax.Array
    inner_params: PyTree
    adjoint: PyTree
    outer_params: PyTree
    estimator_state: PyTree
    model_state: PyTree
    rng: jax.Array

    @property
    def variables(self) -> Variables:
        """The point (z, v, x)."""
        return Variables(self.inner_params, self.adjoint, self.outer_params)


class HostStep(NamedTuple):
    """What `Directions` returns.

    Attributes:
        directions: Variables (D_z, D_v, D_x), to be fed to an optimiser each.
        state: the state with its estimator's memory, model state and step moved on; z, v and x are
            as they were. Where a direction is not finite all of it is as it was.
        info: losses, norms, residual, the user's metrics; `info.ok` is False where the host is to
            leave out its three steps.
        active: Variables of bool scalars, False for what rests in a step (the cheap steps of
            `auto`), its optimiser included; None: always moves.
    """

    directions: Variables
    state: Any
    info: Info
    active: Variables


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """Pure, jittable functions; called, it is `update`.

    Attributes:
        init: `init(inner_params, outer_params, *, model_state=None, rng=None) -> HostState`.
        update: `update(state, batch) -> HostStep`, of a `HostState` or a `TrainState`.
        refresh: `refresh(state, batch) -> state`, as `BilevelSolver`'s, and so are the next two.
        next_refresh: `next_refresh(state) -> int32`.
        refresh_cursor: `refresh_cursor(state) -> int32`.
        method: name and costs.
    """

    init: Callable[..., HostState]
    update: Callable[[Any, Batch], HostStep]
    refresh: Callable[[Any, Batch], Any]
    next_refresh: Callable[[Any], jax.Array]
    refresh_cursor: Callable[[Any], jax.Array]
    method: Method

    def __call__(self, state: Any, batch: Batch) -> HostStep:
        """The directions at a state's point."""
        return self.update(state, batch)


def directions(
    problem: Problem,
    estimator: Estimator | None = None,
    *,
    inner_weights: Any = None,
    outer_weights: Any = None,
    rows: bool = False,
) -> Directions:
    """D_z, D_v and D_x for a training loop that keeps its optimisers, shardings and precision.

    The loop applies three optimisers of its own, all from the old point. That of v may be z's
    (`bf.adjoint.like_inner_optimizer(tx)`, whose `update` takes `inner_opt_state=`,
    `inner_params=`), with statistics of its own. Which parameters stand still is said by
    `oracles.trainable(problem, mask)`, for nobody sees the host's optimiser.

    Args:
        problem: the bilevel problem.
        estimator: of the directions; None: SOBA's, those of the minibatches themselves. Others:
            `from bilevel_flax.solvers.saba import estimator` (`srba`, `storm`, `cheap_steps`).
        inner_weights: float [N], as for the solvers; needs `batch.inner_id`.
        outer_weights: float [M].
        rows: hand on D_x of per-sample leaves as `Rows`, for a row-sparse optimiser
            (`outer.lazy_adam`; apply with `per_sample.apply_updates`); False: dense.

    Returns:
        `Directions`.

    Raises:
        TypeError: `problem` or `estimator` is none; from a call, `state` is none.
        ValueError: weights that are no shares; at trace time whatever the solvers refuse, among it
            a v made for another z.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> directions = bf.directions(problem)
        >>> state = directions.init(jnp.zeros(3), jnp.ones(3))
        >>> @jax.jit
        ... def train_step(state, batch):
        ...     (d_z, d_v, d_x), state, info, _ = directions(state, batch)
        ...     return state.replace(
        ...         inner_params=state.inner_params - 0.5 * d_z,
        ...         adjoint=state.adjoint - 0.5 * d_v,
        ...         outer_params=state.outer_params - 0.1 * d_x,
        ...     ), info
        >>> for _ in range(100):
        ...     state, info = train_step(state, bf.Batch(jnp.ones(3), jnp.full(3, 5.0)))
        >>> [round(float(value), 2) for value in state.outer_params]
        [5.0, 5.0, 5.0]
    """
    checks.problem(problem)
    estimator = of_minibatches() if estimator is None else estimator
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator={estimator!r:.60} is no Estimator: leave it out for SOBA's, or call one, "
            "e.g. of `from bilevel_flax.solvers.saba import estimator`, estimator(problem, N, M)"
        )
    binder = Binder(problem, estimator, inner_weights, outer_weights, "bf.directions")
    full_pass = estimator.full_pass

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        point, model_state, rng = init_variables(
            problem, inner_params, outer_params, model_state, rng
        )
        memory = copied(estimator.init(point))
        return HostState(jnp.int32(0), *point, memory, model_state, rng)

    def update(state, batch):
        if not hasattr(state, "estimator_state"):
            raise TypeError(
                f"state is a {type(state).__name__}, but must be what directions.init returned, or "
                "a TrainState, with its inner_params, adjoint and outer_params replaced"
            )
        oracle = binder.step(state, batch)
        estimate = estimator.update(oracle, state.variables, batch, state.estimator_state)
        norms, finite = norms_and_finite(estimate)
        evaluation, alive = estimate.evaluation, all_finite(finite)
        d_z, d_v, d_x = estimate.directions
        d_x = mask_rows(alive, d_x) if rows else by_row.densify(d_x, state.outer_params)
        new = state.replace(
            step=state.step + 1,
            estimator_state=estimate.state,
            model_state=evaluation.model_state if problem.stateful else state.model_state,
        )
        info = make_info(evaluation, norms, finite, estimator.units)
        moved = rollback_unless(alive, new, state)
        return HostStep(Variables(d_z, d_v, d_x), moved, info, estimate.active)

    def refresh(state, batch):
        if full_pass is None:
            return state
        oracle = binder.part(state, batch)
        memory = full_pass.update(oracle, state.variables, batch, state.estimator_state)
        return state.replace(estimator_state=memory)

    def due(state):
        return jnp.int32(NEVER) if full_pass is None else full_pass.due(state.estimator_state)

    def cursor(state):
        return jnp.int32(NEVER) if full_pass is None else full_pass.cursor(state.estimator_state)

    method = Method("directions", estimator.units, full_pass.units if full_pass else (0.0, 0.0))
    return Directions(init, update, refresh, due, cursor, method)
