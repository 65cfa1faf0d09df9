"""VRBO: variance-reduced bilevel optimisation. SARAH on z and on the Neumann direction.

With D_z = ∇₁G and D = ∇²₂₁G v + ∇₂F, v = -η Σ_{k=0..Q} Π_{j≤k} (I - η ∇²₁₁G_j) ∇₁F,

    every q updates   d_z, d_x = the directions of all the data
    then              x ← x - γ d_x
    T times           d_z += D_z(now) - D_z(previous)       d_x += D(now) - D(previous)
                      z ← z - ρ d_z

each difference on the same fresh minibatches. "Previous" is the point before x moved in the first
of the T steps, then the z before.

The full pass (`refresh`) walks over the data several times, because a product with the full
Hessian needs all of it: once for ∇₁G, ∇₁F and ∇₂F, Q times over the inner data for the series and
once for the cross-JVP. `refresh_cursor` starts over each time until the pass is done.

References:
    J. Yang, K. Ji, Y. Liang. Provably faster algorithms for bilevel optimization. NeurIPS 2021,
    Algorithm 2.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, BilevelSolver, Problem, PyTree, TrainState, Variables
from bilevel_flax.checks import (
    check_count,
    check_positive,
    check_sum,
    require_ids,
)
from bilevel_flax.minibatches import importance_factors, scale
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import (
    StepReport,
    nested,
    refresh_minibatch,
    report_at,
    sampled_oracles,
)
from bilevel_flax.solvers.nested.linear_solves import hypergradient, neumann
from bilevel_flax.solvers.nested.sampled_oracles import (
    SampledOracles,
    at_step,
    axpy,
    completed,
    difference,
    first,
    split,
)
from bilevel_flax.solvers.step import optimizer_step, rollback_unless, tolerant
from bilevel_flax.tree import norm, zeros_like


class VRBOState(NamedTuple):
    """The directions and the full pass in progress."""

    inner: PyTree  # d_z
    outer: PyTree  # d_x, dense
    due: jax.Array  # int32, the update before which a full pass is due
    stage: jax.Array  # int32: 0 gradients, 1 .. Q Hessian products, Q + 1 cross-JVP
    cursor: jax.Array  # int32, minibatches of this stage that are done
    mean_inner: PyTree  # ∇₁G or ∇²₁₁G · term, as far as the stage has come
    mean_outer: PyTree  # ∇₂F + ∇²₂₁G v
    term: PyTree  # Π_{j≤k} (I - ηH) ∇₁F
    total: PyTree  # the terms' sum


def init_memory(variables) -> VRBOState:
    """No direction yet, a full pass due at once."""
    z, x = (zeros_like(tree) for tree in (variables.inner, variables.outer))
    zero = jnp.int32(0)
    return VRBOState(z, x, zero, zero, zero, z, x, z, z)


def _stage_over(memory: VRBOState, step, eta, products: int, period: int) -> VRBOState:
    """The memory once the last minibatch of a stage is in."""
    gradients, last = memory.stage == 0, memory.stage == products + 1
    choose = lambda flag, new, old: jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)
    zero_z, zero_x = (zeros_like(tree) for tree in memory[:2])
    next_term = axpy(-eta, memory.mean_inner, memory.term)
    total = choose(gradients, memory.term, axpy(1.0, next_term, memory.total))
    return VRBOState(
        inner=choose(gradients, memory.mean_inner, memory.inner),
        outer=choose(last, memory.mean_outer, memory.outer),
        due=jnp.where(last, step + period, memory.due),
        stage=jnp.where(last, 0, memory.stage + 1),
        cursor=jnp.zeros_like(memory.cursor),
        mean_inner=zero_z,
        mean_outer=choose(last, zero_x, memory.mean_outer),
        term=choose(last, zero_z, choose(gradients, memory.term, next_term)),
        total=choose(last, zero_z, total),
    )


@takes(Common)
def vrbo(
    problem: Problem,
    *,
    adjoint_step: float | optax.Schedule,
    num_inner_batches: int,
    num_outer_batches: int,
    period: int,
    inner_steps: int = 10,
    adjoint_steps: int = 10,
    **common: Unpack[Common],
) -> BilevelSolver:
    """VRBO: SARAH on both levels with periodic full passes; 2T (Q + 3) units and the passes.

    Args:
        problem: the bilevel problem, a finite sum (a warning says so where it may be none).
        adjoint_step: η, below 1 / (largest eigenvalue of ∇²₁₁G); a schedule counts updates.
        num_inner_batches: N, minibatches of the inner data.
        num_outer_batches: M, minibatches of the outer data.
        period: q, updates from one full pass to the next, at least 1.
        inner_steps: T, at least 1.
        adjoint_steps: Q, Hessian products in a series, at least 0.
        **common: optimisers and weights, see `solvers.keywords`; `outer` is no row-sparse
            one.

    Returns:
        A solver with `batches` (T (Q + 2), T) and a `refresh` of N (Q + 2) + M units.

    Raises:
        ValueError: a count or a step size out of range, weights that are no shares.

    Example:
        >>> import optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> settings = dict(num_inner_batches=8, num_outer_batches=4, period=10, inner_steps=3)
        >>> step = optax.sgd(0.1)
        >>> solver = bf.contrib.vrbo(problem, inner=step, outer=step, adjoint_step=0.5, **settings)
        >>> solver.batches, solver.units
        ((36, 3), 78.0)
    """
    check_count("period", period)
    check_count("inner_steps", inner_steps)
    check_count("adjoint_steps", adjoint_steps, 0)
    check_sum(problem, "vrbo", num_inner_batches, num_outer_batches, common)
    check_positive("adjoint_step", adjoint_step)
    factors = {
        side: importance_factors(f"{side}_weights", common.get(f"{side}_weights"))
        for side in ("inner", "outer")
    }

    def step(sampled: SampledOracles, state, inner, outer):
        memory: VRBOState = state.estimator_state
        z, v, old_x = state.variables
        # Until its pass is done the memory holds no direction: nothing must move.
        whole = jnp.where(memory.due > state.step, 1.0, jnp.nan)
        memory = memory._replace(inner=scale(memory.inner, whole), outer=scale(memory.outer, whole))
        x, outer_opt_state = optimizer_step(
            sampled.transforms.outer, memory.outer, state.outer_opt_state, old_x
        )
        solve = neumann(at_step(adjoint_step, state.step))

        def directions(z, x, minibatches, held_out):
            gradient, system, cross = split(minibatches, 1, adjoint_steps, 1)
            inner_out, d_z = sampled.inner_grad(z, x, first(gradient))
            minibatches = system, first(cross), held_out
            estimate = hypergradient(sampled, z, x, *minibatches, solve, inner_out[1])
            d_x = rows.densify(estimate.d_x, x)
            return d_z, d_x, estimate.adjoint, report_at(inner_out, estimate, (), ())

        def body(carry, minibatches):
            old_z, old_x, z, opt_state, d_z, d_x, _ = carry
            now_z, now_x, v, report = directions(z, x, *minibatches)
            before_z, before_x, *_ = directions(old_z, old_x, *minibatches)
            d_z = axpy(1.0, difference(now_z, before_z), d_z)
            d_x = axpy(1.0, difference(now_x, before_x), d_x)
            gradient = first(minibatches[0])
            new_z, opt_state = sampled.inner_step(z, opt_state, x, gradient, report.inner[0], d_z)
            report = report._replace(inner_norms=norm(d_z))
            return (z, x, new_z, opt_state, d_z, d_x, v), report

        by_step = jax.tree.map(lambda leaf: leaf.reshape(inner_steps, -1, *leaf.shape[1:]), inner)
        carry = (z, old_x, z, state.inner_opt_state, memory.inner, memory.outer, v)
        carry, reports = jax.lax.scan(body, carry, (by_step, outer))
        _, _, z, inner_opt_state, d_z, d_x, v = carry
        state = state.replace(
            inner_params=z,
            adjoint=v,
            outer_params=x,
            inner_opt_state=inner_opt_state,
            outer_opt_state=outer_opt_state,
            estimator_state=memory._replace(inner=d_z, outer=d_x),
        )
        start = first(reports)
        # d_x as it is now, the direction of x's next move: a NaN in it must stop this update.
        report = StepReport(
            start.inner,
            start.outer,
            reports.inner_norms,
            reports.adjoint_norm[-1],
            reports.residual[-1],
            d_x,
        )
        return state, report

    solver = nested(
        problem,
        step,
        name="vrbo",
        memory=init_memory,
        batches=(inner_steps * (adjoint_steps + 2), inner_steps),
        units=2 * inner_steps * (adjoint_steps + 3),
        moves_outer=True,
        fixed_keys=True,
        **common,
    )

    def refresh(state: TrainState, batch: Batch) -> TrainState:
        needed = {side: f is not None or problem.stateful for side, f in factors.items()}
        require_ids(batch, "vrbo", needed)
        memory: VRBOState = state.estimator_state
        z, _, x = state.variables
        eta = at_step(adjoint_step, state.step)
        inner = tolerant(checks.optimizer("inner", common.get("inner")))
        sampled = sampled_oracles(problem, Variables(inner, None, None), state)
        mean_z, mean_x, term = memory.mean_inner, memory.mean_outer, memory.term
        if batch.inner is not None:
            minibatch = refresh_minibatch(problem, state, batch, "inner", factors["inner"])
            no_z, no_x = (zeros_like(tree) for tree in (z, x))

            def cross():
                v = scale(memory.total, -eta)
                return no_z, rows.densify(sampled.cross_jvp(z, v, x, minibatch), x)

            branches = (
                lambda: (sampled.inner_grad(z, x, minibatch)[1], no_x),
                lambda: (sampled.hvp(z, term, x, minibatch), no_x),
                cross,
            )
            kind = jnp.where(memory.stage == 0, 0, jnp.where(memory.stage <= adjoint_steps, 1, 2))
            add_z, add_x = jax.lax.switch(kind, branches)
            mean_z = axpy(1 / num_inner_batches, add_z, mean_z)
            mean_x = axpy(1 / num_inner_batches, add_x, mean_x)
        else:
            minibatch = refresh_minibatch(problem, state, batch, "outer", factors["outer"])
            grads = sampled.outer_grads(z, x, minibatch)
            term = axpy(1 / num_outer_batches, grads.inner, term)
            mean_x = axpy(1 / num_outer_batches, completed(grads.outer, x), mean_x)
        memory = memory._replace(
            cursor=memory.cursor + 1, mean_inner=mean_z, mean_outer=mean_x, term=term
        )
        size = num_inner_batches + jnp.where(memory.stage == 0, num_outer_batches, 0)
        over = _stage_over(memory, state.step, eta, adjoint_steps, period)
        memory = rollback_unless(memory.cursor >= size, over, memory)
        return state.replace(estimator_state=memory)

    return solver._replace(
        refresh=refresh,
        next_refresh=lambda state: state.estimator_state.due,
        refresh_cursor=lambda state: state.estimator_state.cursor,
        method=solver.method._replace(refresh_units=(1.0, 1.0)),
    )
