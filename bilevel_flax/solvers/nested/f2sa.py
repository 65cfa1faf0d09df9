"""F2SA: fully first-order stochastic approximation. No Hessian products at all.

With y the tracked minimiser of λG + F beside z, the one of G, on shared minibatches,

    T times      y ← y - ρ' (λ ∇₁G(y, x) + ∇₁F(y, x))        z ← z - ρ ∇₁G(z, x)
    then         x ← x - γ (∇₂F(y, x) + λ (∇₂G(y, x) - ∇₂G(z, x)))

and λ grows. λ(y - z) tends to v*, so it is what `state.adjoint` holds, and
λ(∇₁G(y) - ∇₁G(z)) + ∇₁F(y) takes the place of Hv + ∇₁F in the residual. The source draws
independent minibatches for y and z; a shared one keeps the noise of λ(∇₂G(y) - ∇₂G(z)) from
growing with λ.

References:
    J. Kwon, D. Kwon, S. Wright, R. D. Nowak. A fully first-order method for stochastic bilevel
    optimization. ICML 2023, Algorithm 1 (there y is the minimiser of G and z the other).
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import optax

from bilevel_flax import checks
from bilevel_flax.base import BilevelSolver, Problem, PyTree
from bilevel_flax.checks import check_count, check_positive
from bilevel_flax.minibatches import scale
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import nested, report_at
from bilevel_flax.solvers.nested.linear_solves import Hypergradient
from bilevel_flax.solvers.nested.sampled_oracles import (
    SampledOracles,
    at_step,
    axpy,
    completed,
    difference,
    first,
    split,
)
from bilevel_flax.solvers.step import optimizer_step, tolerant
from bilevel_flax.tree import filter_inexact, norm, zeros_like


class F2SAState(NamedTuple):
    """The second inner variable."""

    params: PyTree  # y, tree of z
    opt_state: PyTree


def penalty_growth(t):
    """10 (t + 1)^1/7, the published growth of λ where both levels are stochastic."""
    return 10.0 * (t + 1.0) ** (1 / 7)


@takes(Common)
def f2sa(
    problem: Problem,
    *,
    penalised: optax.GradientTransformation | None = None,
    inner_steps: int = 10,
    penalty: float | optax.Schedule = penalty_growth,
    **common: Unpack[Common],
) -> BilevelSolver:
    """F2SA: T steps on each of two inner variables, one outer step; 3T + 3 gradients.

    Args:
        problem: the bilevel problem.
        penalised: optimiser of y, fed λ∇₁G + ∇₁F; None: `inner`, fed ∇₁G + ∇₁F/λ (the source's
            coupling ρ' = ρ/λ).
        inner_steps: T, at least 1.
        penalty: λ, at least twice (smoothness of F) / (strong convexity of G); a schedule counts
            updates. The bias of D_x is O(1/λ).
        **common: optimisers and weights, see `solvers.keywords`; `outer` is no row-sparse
            one.

    Returns:
        A solver with `batches` (T + 1, T + 1).

    Raises:
        ValueError: `inner_steps` or `penalty` out of range, weights that are no shares, an inner
            problem that is a condition.

    Example:
        >>> import optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.f2sa(problem, inner=optax.sgd(0.5), outer=optax.sgd(0.1))
        >>> solver.batches, solver.units
        ((11, 11), 33.0)
    """
    checks.has_value(problem, "f2sa")
    check_count("inner_steps", inner_steps)
    check_positive("penalty", penalty)
    second = tolerant(penalised or checks.optimizer("inner", common.get("inner")))

    def start(variables):
        return F2SAState(variables.inner, second.init(filter_inexact(variables.inner)))

    def step(sampled: SampledOracles, state, inner, outer):
        z, _, x = state.variables
        weight = at_step(penalty, state.step)
        loops, last = zip(
            *(split(minibatches, inner_steps, 1) for minibatches in (inner, outer)), strict=True
        )

        def body(carry, minibatches):
            z, opt_z, y, opt_y, *_ = carry
            inner_batch, outer_batch = minibatches
            out, grad_z = sampled.inner_grad(z, x, inner_batch)
            _, grad_y = sampled.inner_grad(y, x, inner_batch)
            grads = sampled.outer_grads(y, x, outer_batch, out[1])
            grad_y = sampled.constrain(grad_y)
            product = scale(difference(grad_y, sampled.constrain(grad_z)), weight)
            d_y = axpy(weight, grad_y, grads.inner)
            if penalised is None:
                d_y = scale(d_y, 1 / weight)
            z, opt_z = sampled.inner_step(z, opt_z, x, inner_batch, out[0], grad_z)
            extra = {"value": out[0], "grad": filter_inexact(d_y), "outer_params": x}
            y, opt_y = optimizer_step(second, d_y, opt_y, y, **extra)
            return (z, opt_z, y, opt_y, product, grads.inner), (out, norm(grad_z))

        zero = zeros_like(z)
        carry = (z, state.inner_opt_state, *state.estimator_state, zero, zero)
        carry, (outs, norms) = jax.lax.scan(body, carry, loops)
        z, opt_z, y, opt_y, product, grad_y = carry
        inner_batch, outer_batch = (first(minibatches) for minibatches in last)
        inner_out = first(outs)
        grads = sampled.outer_grads(y, x, outer_batch, inner_out[1])
        gap = difference(
            sampled.inner_grad_outer(y, x, inner_batch), sampled.inner_grad_outer(z, x, inner_batch)
        )
        d_x = axpy(weight, gap, completed(grads.outer, x))
        v = axpy(weight, difference(y, z), zeros_like(state.adjoint))
        state = state.replace(
            inner_params=z, adjoint=v, inner_opt_state=opt_z, estimator_state=F2SAState(y, opt_y)
        )
        at = Hypergradient(v, product, d_x, grads._replace(inner=grad_y))
        return state, report_at(inner_out, at, norms)

    return nested(
        problem,
        step,
        name="f2sa",
        memory=start,
        batches=(inner_steps + 1, inner_steps + 1),
        units=3 * inner_steps + 3,
        row_directions=False,
        second_order=False,
        **common,
    )
