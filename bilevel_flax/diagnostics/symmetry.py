"""Is the inner gradient the gradient of something? A method that solves with H relies on it.

D_x is the hypergradient where z stands still at ∇₁G = 0 and ∇²₁₁G is the Jacobian of ∇₁G, a
symmetric matrix. Two things break that without a sign in the residual or in a gradient:

* `stop_gradient` on what depends on z (targets in temporal differences, teachers): ∇₁G moves with
  it, and ∇²₁₁G does not;
* a gradient of one's own (`custom_vjp`, gradient reversal): its Jacobian need not be symmetric.

Both are compared as numbers, so that `stop_gradient` on constants, or where its derivative cancels
(the maximum in a softmax), is no matter.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax

from bilevel_flax.base import Batch, Problem, PyTree, TrainState, Variables
from bilevel_flax.oracles.symmetry import gradient_defects


class SymmetryCheck(NamedTuple):
    """How far the inner gradient is from being one.

    Attributes:
        asymmetry: |uᵀJv - vᵀJu| for random u and v, J the Jacobian of ∇₁G, relative to ‖J‖.
        stopped: how far the products with ∇²₁₁G are from those with ∇₁G's Jacobian, relative.
        tolerance: what rounding may make of either.
    """

    asymmetry: float
    stopped: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both are rounding."""
        return max(self.asymmetry, self.stopped) <= self.tolerance

    @property
    def message(self) -> str:
        """What is wrong and what to do; "" where nothing is."""
        if self.stopped > self.tolerance:
            return (
                f"inner_loss holds a stop_gradient on something that depends on inner_params: its "
                f"Hessian is not the Jacobian of its gradient (they differ by {self.stopped:.2g}), "
                "so the adjoint and D_x belong to another problem: write the loss without it, or "
                "with the stopped value as an outer or model state"
            )
        if self.asymmetry > self.tolerance:
            return (
                f"inner_loss's gradient is no gradient: the Jacobian is not symmetric "
                f"({self.asymmetry:.2g}), so the adjoint and D_x are wrong: a custom_vjp or a "
                "gradient reversal in it has to be the derivative of the loss"
            )
        return ""


def check_symmetry(
    problem: Problem,
    point: TrainState | Variables,
    batch: Batch | Any,
    *,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
) -> SymmetryCheck:
    """Compares products with ∇²₁₁G, its transpose and the Jacobian of ∇₁G on one minibatch.

    Args:
        problem: the problem; stateful and per-sample ones too.
        point: a `TrainState` (its model state and key are used), or `Variables`. Anywhere will do
            but where ∇₁G is constant.
        batch: an inner minibatch, or a `Batch` with one.
        model_state: of a stateful problem; None: the state's.
        rng: of a stateful problem; None: the state's.

    Returns:
        The two numbers; where they are no rounding, a warning has said what is wrong.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> def inner_loss(z, x, batch):
        ...     return 0.5 * ((z - x * jax.nn.log_softmax(z)) ** 2).sum()
        >>> problem = bf.Problem(inner_loss, lambda z, x, batch: z.sum())
        >>> point = bf.Variables(jnp.ones(3), jnp.zeros(3), jnp.array(0.5))
        >>> bf.diagnostics.check_symmetry(problem, point, None).ok
        True
    """
    if isinstance(point, TrainState):
        model_state = point.model_state if model_state is None else model_state
        rng = point.rng if rng is None else rng
        point = point.variables
    if problem.stateful and rng is None:
        rng = jax.random.PRNGKey(0)
    minibatch = batch.inner if isinstance(batch, Batch) else batch
    rng = rng if problem.stateful else None
    numbers = gradient_defects(problem, point.inner, point.outer, minibatch, model_state, rng)
    check = SymmetryCheck(*(float(number) for number in numbers))
    if not check.ok:
        warnings.warn(check.message, stacklevel=2)
    return check
