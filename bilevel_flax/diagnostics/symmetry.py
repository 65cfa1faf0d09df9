"""Is the inner gradient the gradient of something? A method that solves with H relies on it.

D_x is the hypergradient where z stands still at ∇₁G = 0 and ∇²₁₁G is the Jacobian of ∇₁G, a
symmetric matrix. Two things break that without a sign in the residual or in a gradient:

* `stop_gradient` on what depends on z (targets in temporal differences, teachers): ∇₁G moves with
  it, and ∇²₁₁G does not;
* a gradient of one's own (`custom_vjp`, gradient reversal): its Jacobian need not be symmetric.

The remedy for either is to write ∇₁G down as what it is, a condition (`Problem.from_condition`).
A condition's J need not be symmetric; a `stop_gradient` in it is as wrong as in a loss.

Both are compared as numbers, so that `stop_gradient` on constants, or where its derivative cancels
(the maximum in a softmax), is no matter.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax

from bilevel_flax.base import Batch, Problem, PyTree, TrainState, Variables
from bilevel_flax.base.condition import is_condition
from bilevel_flax.diagnostics.place import place
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.jaxprs import primitives
from bilevel_flax.oracles.symmetry import gradient_defects

_RULES = ("stop_gradient", "kernel_with_reference")  # beside custom_jvp and custom_vjp


class SymmetryCheck(NamedTuple):
    """How far the inner gradient is from being one.

    Attributes:
        asymmetry: `|uᵀJv - vᵀJu|` for random u and v, J the Jacobian of ∇₁G, relative to ‖J‖; 0 for
            a condition, of which it is not asked.
        stopped: how far the products with ∇²₁₁G are from those with ∇₁G's Jacobian, relative.
        tolerance: what rounding may make of either.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> stopped = lambda z, x, b: 0.5 * (1 + 0.5 * jax.lax.stop_gradient(z) - z) ** 2
        >>> problem = bf.Problem(stopped, lambda z, x, b: z)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(0.0), jnp.array(0.0))
        >>> check = bf.diagnostics.check_symmetry(problem, point, 0.0)
        >>> check.stopped > check.tolerance
        True
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
                "the inner problem holds a stop_gradient on what depends on inner_params: products "
                f"with its Jacobian leave that out (they are off by {self.stopped:.2g}), so the "
                "adjoint and D_x belong to another problem: write its gradient, without "
                "stop_gradient, as a condition: bf.Problem.from_condition"
            )
        if self.asymmetry > self.tolerance:
            return (
                "inner_loss's gradient is no gradient: the Jacobian is not symmetric "
                f"({self.asymmetry:.2g}), so the adjoint and D_x are wrong: write it as a "
                "condition (bf.Problem.from_condition), or a custom_vjp or gradient reversal in "
                "the loss as its derivative"
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
    point, model_state, rng = place(problem, point, model_state, rng)
    minibatch = batch.inner if isinstance(batch, Batch) else batch
    args = (problem, point.inner, point.outer, minibatch, model_state, rng)
    if not _has_rules_of_its_own(*args):
        return SymmetryCheck(0.0, 0.0, 0.0)
    check = SymmetryCheck(*(float(number) for number in gradient_defects(*args)))
    if is_condition(problem.inner_loss):
        check = check._replace(asymmetry=0.0)
    if not check.ok:
        warnings.warn(check.message, stacklevel=2)
    return check


def _has_rules_of_its_own(problem: Problem, z, x, minibatch, model_state, rng) -> bool:
    """Whether JAX is told anywhere in the loss how to derive; without, there is nothing to find."""
    loss, z_split, x_split, _ = losses.inner(problem, z, x, minibatch, model_state, rng)
    jaxpr = jax.make_jaxpr(lambda leaves: loss(leaves, x_split.leaves)[0])(z_split.leaves)
    names = primitives(jaxpr)
    return any(name in _RULES or name.startswith("custom_") for name in names)
