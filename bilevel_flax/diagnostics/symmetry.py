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

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.extend.core.primitives import copy_p, stop_gradient_p

from bilevel_flax import oracles
from bilevel_flax.base import Batch, Problem, PyTree, TrainState, Variables
from bilevel_flax.tree import norm, split


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
    numbers = _compared(problem, point.inner, point.outer, minibatch, model_state, rng)
    check = SymmetryCheck(*(float(number) for number in numbers))
    if not check.ok:
        warnings.warn(check.message, stacklevel=2)
    return check


@functools.partial(jax.jit, static_argnums=0)
def _compared(problem: Problem, z, x, batch, model_state, rng):
    floats = split(z)

    def field(leaves):
        grad = oracles.inner_grad(problem, floats.merge(leaves), x, batch, model_state, rng)
        return split(grad).leaves

    u, v = (
        optax.tree.random_like(jax.random.PRNGKey(seed), floats.leaves, jax.random.normal)
        for seed in (0, 1)
    )
    jaxpr = jax.make_jaxpr(field)(floats.leaves)
    moving = core.jaxpr_as_fun(_moving(jaxpr))
    eps = max(float(jnp.finfo(dtype).eps) for dtype in _dtypes(jaxpr.jaxpr))

    # Transposed products alone: every loss has them, also one without a forward mode.
    (image_u,), (image_v,) = (jax.vjp(field, floats.leaves)[1](w) for w in (u, v))
    true_v = jax.vjp(lambda leaves: moving(*leaves), floats.leaves)[1](v)[0]
    size = sum(leaf.size for leaf in floats.leaves)
    skew = jnp.abs(_dot(u, image_v) - _dot(v, image_u)) * jnp.sqrt(size)
    scale = norm(u) * norm(image_v) + norm(v) * norm(image_u)
    stopped = norm(jax.tree.map(jnp.subtract, true_v, image_v))
    return _share(skew, scale), _share(stopped, norm(true_v)), 3 * eps**0.5


def _dot(tree, other):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, other)))


def _share(part, whole):
    return jnp.where(part > 0, part / jnp.where(whole > 0, whole, part), 0.0)


def _moving(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The function with every `stop_gradient` taken out, inside loops and branches too."""

    def rewrite(value):
        if isinstance(value, core.ClosedJaxpr):
            return _moving(value)
        if isinstance(value, core.Jaxpr):
            return value.replace(eqns=[equation(eqn) for eqn in value.eqns])
        if type(value) in (tuple, list):
            return type(value)(rewrite(item) for item in value)
        return value

    def equation(eqn):
        if eqn.primitive is stop_gradient_p:
            return eqn.replace(primitive=copy_p, params={})
        return eqn.replace(params={name: rewrite(value) for name, value in eqn.params.items()})

    return core.ClosedJaxpr(rewrite(closed.jaxpr), closed.consts)


def _dtypes(value: Any) -> set:
    """The floating-point types that a jaxpr computes in."""
    if isinstance(value, core.ClosedJaxpr):
        return _dtypes(value.jaxpr)
    if type(value) in (tuple, list):
        return set().union(*map(_dtypes, value))
    if not isinstance(value, core.Jaxpr):
        return set()
    variables = (*value.invars, *(variable for eqn in value.eqns for variable in eqn.outvars))
    own = {variable.aval.dtype for variable in variables if hasattr(variable.aval, "dtype")}
    own = {dtype for dtype in own if jnp.issubdtype(dtype, jnp.floating)}
    return own.union(*(_dtypes(item) for eqn in value.eqns for item in eqn.params.values()))
