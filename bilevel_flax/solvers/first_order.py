"""First order: a single-loop penalty method, three gradients a step, for kernels of any kind.

    D_z = ∇₁G(z)    D_v = λ(∇₁G(y) - ∇₁G(z)) + ∇₁F(y)    D_x = λ(∇₂G(y) - ∇₂G(z)) + ∇₂F(y)

at y = z + v/λ: F2SA's two networks, z on G and y on G + F/λ, with one step of each in the place of
its inner loops, and v = λ(y - z) kept in the place of y. So y is carried along by z's steps, v
tends to v* whatever λ does, and all that moves v in `auto` (z's optimiser, a damping that follows
the residual) moves y. λ follows ‖v‖ so that y stays at the distance from z at which the bias O(1/λ)
meets rounding; there is no schedule to wait for.

References:
    J. Kwon, D. Kwon, S. Wright, R. D. Nowak. A fully first-order method for stochastic bilevel
    optimization. ICML 2023. J. Kwon, D. Kwon, S. Wright, R. D. Nowak. On penalty methods for
    nonconvex bilevel optimization and first-order stochastic approximation. ICLR 2024.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import oracles
from bilevel_flax.base import BilevelSolver, Estimate, Estimator, Problem
from bilevel_flax.checks import UserError, check_number
from bilevel_flax.solvers.auto import auto
from bilevel_flax.tree import is_inexact

# What `auto` can do and this method cannot, as it is where it is not asked for.
_OF_AUTO = {
    "estimator": None,
    "subsample": 1.0,
    "update_every": 1,
    "adjoint_update_every": 1,
    "cooldown": 0.0,
}


def estimator(penalty: float | None = None) -> Estimator:
    """SOBA's directions from first derivatives alone, for `single_loop` and `auto`.

    Args:
        penalty: λ > 0 at most; None: as ‖v‖ asks (`oracles.evaluate_by_penalty`).

    Raises:
        UserError: `penalty` is no positive number.
        ValueError: at trace time, v/λ would vanish beside z in z's dtype.
    """
    if penalty is not None:
        check_number("penalty", penalty, 0.0)
    evaluate = functools.partial(oracles.evaluate_by_penalty, penalty=penalty)

    def update(oracle, variables, batch, state):
        del batch
        if penalty is not None:
            _resolved(penalty, variables.inner)
        evaluation = oracle.directions(variables, evaluate)
        return Estimate(evaluation.directions, state, evaluation)

    return Estimator(init=lambda variables: (), update=update, units=3.0, second_order=False)


def first_order(
    problem: Problem,
    *,
    inner: optax.GradientTransformation,
    steps: int,
    penalty: float | None = None,
    **settings: Any,
) -> BilevelSolver:
    """`auto` without second derivatives: z's optimiser and the number of steps are all it needs.

    Three gradients a step, of G at two points and of F, and the memory of one: for losses that
    nothing differentiates twice (`oracles.probe`). D_x has a bias of O(1/λ); with λ as chosen here
    it is about √eps of D_x, 3e-4, in float32, and a tenth of it in bfloat16 (docs/kernels.md).

    Args:
        problem: the bilevel problem; per-sample, stateful, `data_parallel` ... as for `auto`.
        inner: z's optimiser.
        steps: updates in the run.
        penalty: λ, once v is long enough for y to stand out from z (lower until then, and where
            rounding asks for it); None: as ‖v‖ asks.
        **settings: as `auto`, but for `estimator`, `subsample` and the steps that rest.

    Returns:
        A `BilevelSolver` of 3 units. `state.adjoint` is v = λ(y - z); `info.outer_loss` is F at y.

    Raises:
        UserError: `penalty` is no positive number; a setting of `auto` that has no meaning here.
        ValueError: as `auto`; at trace time, a penalty that z's dtype cannot resolve, or an inner
            problem without a value (`Problem.from_condition`).

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.first_order(problem, inner=optax.adam(0.1), steps=3000)
        >>> state, update = solver.init(jnp.zeros(3), jnp.ones(3)), jax.jit(solver.update)
        >>> for _ in range(3000):
        ...     state, info = update(state, bf.Batch(jnp.ones(3), jnp.full(3, 2.0)))
        >>> [round(float(value), 1) for value in state.outer_params]
        [2.0, 2.0, 2.0]
    """
    for name, unset in _OF_AUTO.items():
        if settings.pop(name, unset) != unset:
            raise UserError(
                f"{name}= has no meaning for first_order, whose steps are three gradients each: "
                "leave it out, or take bf.auto"
            )
    solver = auto(problem, inner=inner, steps=steps, estimator=estimator(penalty), **settings)
    return solver._replace(method=solver.method._replace(name="first_order"))


def _resolved(penalty: float, z: Any) -> None:
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(z) if is_inexact(leaf))
    if penalty > 1 / eps:
        raise ValueError(
            f"penalty={penalty:g} is out of reach: y = z + v/λ is z itself in inner_params' dtype "
            f"(at most {1 / eps:.0e}); leave it out, and it follows ‖v‖"
        )
