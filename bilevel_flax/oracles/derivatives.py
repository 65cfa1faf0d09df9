"""The quantities one by one, so that no method pays for one that it does not use.

`Problem.derivatives` chooses among three ways to ∇₁G, ∇²₁₁G v and ∇²₂₁G v; the package's docstring
tells them apart. A `Microbatched` loss has each quantity summed over parts of the minibatch.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import Problem, PyTree, Variables
from bilevel_flax.base.condition import is_condition
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.microbatches import in_parts, whole
from bilevel_flax.oracles.stops import refusal
from bilevel_flax.tree import is_inexact, split

# Of `inner_grad_and_cross` where x enters after the network: a gradient and a forward tangent.
FORWARD_UNITS = 5 / 3


def inner_products(problem: Problem, variables: Variables, batch, model_state=None, rng=None):
    """∇₁G, ∇²₁₁G v and ∇²₂₁G v from one differentiated backprop (3 units).

    Args:
        problem: the problem.
        variables: the point (z, v, x).
        batch: an inner minibatch.
        model_state: mutable state, handed to a stateful loss.
        rng: its key; one draw serves the primal and the tangent.

    Returns:
        `((loss, aux), inner_grad, hvp, cross_jvp)`.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> (loss, aux), *products = bf.oracles.inner_products(problem, point, 1.0)
        >>> [float(product) for product in products]
        [-3.0, 1.0, -1.0]
    """
    if in_parts(problem.inner_loss):
        part = lambda problem, *args: inner_products(problem, variables, *args)
        return whole(part, problem, "inner_loss", variables[::2], batch, model_state, rng)
    z, v, x = variables
    check_adjoint(z, v)
    loss, z_split, x_split, as_outer = losses.inner(problem, z, x, batch, model_state, rng)
    out, grad, (hvp, cross) = PRODUCTS[problem.derivatives](
        loss, z_split.leaves, x_split.leaves, split(v).leaves
    )
    return out, z_split.complete(grad), z_split.complete(hvp), as_outer(cross)


def inner_grad_and_cross(problem: Problem, variables: Variables, batch, model_state=None, rng=None):
    """∇₁G and ∇²₂₁G v without Hv: what x needs in a step in which v stands still.

    ∇²₂₁G v is the gradient in x of one number, the slope of G at z in the direction v. Forward mode
    gives the slope for two products a layer, on top of the forward pass that ∇₁G takes anyway,
    and backprop to x goes only as deep as x enters: for weights of examples, not into the network
    at all (5/3 units then).

    Args:
        problem: the problem, with forward-mode derivatives.
        variables: the point (z, v, x).
        batch: an inner minibatch.
        model_state: mutable state, handed to a stateful loss.
        rng: its key; one draw serves both.

    Returns:
        `((loss, aux), inner_grad, cross_jvp)`.

    Raises:
        ValueError: `problem.derivatives` is another mode.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> _, gradient, cross = bf.oracles.inner_grad_and_cross(problem, point, 1.0)
        >>> float(gradient), float(cross)
        (-3.0, -1.0)
    """
    if problem.derivatives != "forward_over_reverse":
        raise ValueError(
            f"derivatives={problem.derivatives!r}: D_x without Hv needs forward mode; leave out "
            "adjoint_update_every"
        )
    if in_parts(problem.inner_loss):
        part = lambda problem, *args: inner_grad_and_cross(problem, variables, *args)
        return whole(part, problem, "inner_loss", variables[::2], batch, model_state, rng)
    z, v, x = variables
    check_adjoint(z, v)
    loss, z_split, x_split, as_outer = losses.inner(problem, z, x, batch, model_state, rng)
    direction = split(v).leaves

    def slope(x_leaves):
        value_at = lambda z_leaves: loss(z_leaves, x_leaves)[0]
        return jax.jvp(value_at, (z_split.leaves,), (direction,))[1]

    # Two forward passes in the program, one after XLA's common-subexpression elimination.
    out, grad = jax.value_and_grad(loss, has_aux=True)(z_split.leaves, x_split.leaves)
    cross = jax.grad(slope)(x_split.leaves)
    return out, z_split.complete(grad), as_outer(cross)


def inner_value_and_grad(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁G)` (1 unit).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> (loss, aux), gradient = bf.oracles.inner_value_and_grad(problem, z, x, 1.0)
        >>> float(loss), float(gradient)
        (4.5, -3.0)
    """
    if in_parts(problem.inner_loss):
        part = lambda problem, *args: inner_value_and_grad(problem, z, x, *args)
        return whole(part, problem, "inner_loss", (z, x), batch, model_state, rng)
    loss, z_split, x_split, _ = losses.inner(problem, z, x, batch, model_state, rng)
    out, grad = jax.value_and_grad(loss, has_aux=True)(z_split.leaves, x_split.leaves)
    return out, z_split.complete(grad)


def inner_grad(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₁G (1 unit).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> float(bf.oracles.inner_grad(problem, z, x, 1.0))
        -3.0
    """
    return inner_value_and_grad(problem, z, x, batch, model_state, rng)[1]


def inner_value_and_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁G, ∇₂G)` from one backprop (1 unit); per-sample leaves of ∇₂G are `Rows`.

    Raises:
        ValueError: the inner problem is a condition, which is the gradient of nothing.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> (loss, aux), *gradients = bf.oracles.inner_value_and_grads(problem, z, x, 1.0)
        >>> [float(gradient) for gradient in gradients]
        [-3.0, 3.0]
    """
    if is_condition(problem.inner_loss):
        raise ValueError(
            "a condition has no value, so there is no gradient of it in outer_params: take a "
            "method with an adjoint, e.g. soba, auto or implicit"
        )
    if in_parts(problem.inner_loss):
        part = lambda problem, *args: inner_value_and_grads(problem, z, x, *args)
        return whole(part, problem, "inner_loss", (z, x), batch, model_state, rng)
    loss, z_split, x_split, as_outer = losses.inner(problem, z, x, batch, model_state, rng)
    out, (grad_z, grad_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        z_split.leaves, x_split.leaves
    )
    return out, z_split.complete(grad_z), as_outer(grad_x)


def inner_grad_outer(problem: Problem, z, x, batch, model_state=None, rng=None) -> PyTree:
    """∇₂G, the inner loss's direct gradient in x (1 unit); per-sample leaves are `Rows`.

    Raises:
        ValueError: as `inner_value_and_grads`.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> float(bf.oracles.inner_grad_outer(problem, z, x, 1.0))
        3.0
    """
    return inner_value_and_grads(problem, z, x, batch, model_state, rng)[2]


def hvp(problem: Problem, variables: Variables, batch, model_state=None, rng=None) -> PyTree:
    """∇²₁₁G v (1 unit by the papers' count).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> float(bf.oracles.hvp(problem, point, 1.0))
        1.0
    """
    return inner_products(problem, variables, batch, model_state, rng)[2]


def cross_jvp(problem: Problem, variables: Variables, batch, model_state=None, rng=None) -> PyTree:
    """∇²₂₁G v (1 unit by the papers' count); per-sample leaves are `Rows`.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> float(bf.oracles.cross_jvp(problem, point, 1.0))
        -1.0
    """
    return inner_products(problem, variables, batch, model_state, rng)[3]


def outer_value_and_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`((loss, aux), ∇₁F, ∇₂F)` from one backprop (1 unit); per-sample leaves of ∇₂F are None.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> (loss, aux), *gradients = bf.oracles.outer_value_and_grads(problem, z, x, 1.0)
        >>> float(loss), [float(gradient) for gradient in gradients]
        (0.0, [1.0, 0.0])
    """
    if in_parts(problem.outer_loss):
        part = lambda problem, *args: outer_value_and_grads(problem, z, x, *args)
        return whole(part, problem, "outer_loss", (z, x), batch, model_state, rng)
    loss, z_split, x_split = losses.outer(problem, z, x, batch, model_state, rng)
    out, (grad_z, grad_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        z_split.leaves, x_split.leaves
    )
    return out, z_split.complete(grad_z), x_split.complete(grad_x)


def outer_grads(problem: Problem, z, x, batch, model_state=None, rng=None):
    """`(∇₁F, ∇₂F)` from one backprop (1 unit).

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> [float(gradient) for gradient in bf.oracles.outer_grads(problem, z, x, 1.0)]
        [1.0, 0.0]
    """
    return outer_value_and_grads(problem, z, x, batch, model_state, rng)[1:]


def unrolled_value_and_grad(problem: Problem, unroll: Callable, x, batch, rng=None):
    """d/dx F(z_K(x), x) by backprop through an inner loop, the loop's start held fixed.

    Args:
        problem: the problem.
        unroll: `unroll(x) -> (z_K, model_state, extra)`, differentiable in x's float leaves, with
            the mutable state that a stateful outer loss is to be handed.
        x: the outer parameters.
        batch: an outer minibatch.
        rng: key of a stateful outer loss.

    Returns:
        `((loss, aux), gradient, (z_K, extra))`; the gradient is dense, in x's tree. K inner
        gradients, K HVPs, K cross-JVPs and one gradient of F: 3K + 1 units.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> z, x = jnp.array(0.0), jnp.array(3.0)
        >>> def unroll(x):  # two steps of gradient descent
        ...     grad = lambda z: bf.oracles.differentiable_inner_grad(problem, z, x, 1.0)[1]
        ...     step = lambda z: z - 0.5 * grad(z)
        ...     return step(step(z)), None, None
        >>> float(bf.oracles.unrolled_value_and_grad(problem, unroll, x, 1.0)[1])
        0.75
    """
    x_split = split(x)

    def total(leaves):
        x = x_split.merge(leaves)
        z, model_state, extra = unroll(x)

        def value(problem, batch, model_state, rng):
            loss, z_split, x_seen = losses.outer(problem, z, x, batch, model_state, rng)
            return (loss(z_split.leaves, x_seen.leaves),)

        # Backprop through a sum of parts would keep the activations of them all.
        part = value
        if in_parts(problem.outer_loss):
            part = lambda problem, *args: jax.checkpoint(lambda *rest: value(problem, *rest))(*args)
        ((loss, aux),) = whole(part, problem, "outer_loss", (z, x), batch, model_state, rng)
        return loss, (aux, (z, extra))

    (value, (aux, results)), grad = jax.value_and_grad(total, has_aux=True)(x_split.leaves)
    return (value, aux), x_split.complete(grad), results


def check_adjoint(z: PyTree, v: PyTree) -> None:
    """Raises unless v has z's tree, and the shapes and dtypes of its float leaves.

    Raises:
        ValueError: names the first difference.
    """
    if jax.tree.structure(z) != jax.tree.structure(v):
        raise ValueError(
            "the adjoint's tree differs from inner_params': "
            f"{jax.tree.structure(v)} against {jax.tree.structure(z)}; "
            "start from `solver.init`, or jax.tree.map(jnp.zeros_like, inner_params)"
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(z), jax.tree.leaves(v), strict=True):
        if is_inexact(a) and (jnp.shape(a), jnp.result_type(a)) != (
            jnp.shape(b),
            jnp.result_type(b),
        ):
            raise ValueError(
                f"the adjoint's leaf {jax.tree_util.keystr(path)} is "
                f"{jnp.result_type(b)}{jnp.shape(b)}, inner_params' is "
                f"{jnp.result_type(a)}{jnp.shape(a)}: v has z's shapes and dtypes exactly"
            )


def _forward_over_reverse(loss, z, x, v):
    def grads(z):
        (value, aux), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(z, x)
        return grads, (value, aux)

    try:
        (grad_z, _), products, out = jax.jvp(grads, (z,), (v,), has_aux=True)
    except (TypeError, NotImplementedError) as error:
        _explain(error, loss, z, x, "forward_over_reverse")
        raise
    return out, grad_z, products


def _reverse_over_reverse(loss, z, x, v):
    def product(z, x):
        out, grad_z = jax.value_and_grad(loss, has_aux=True)(z, x)
        return optax.tree.vdot(grad_z, v), (grad_z, out)

    try:
        products, (grad_z, out) = jax.grad(product, (0, 1), has_aux=True)(z, x)
    except (TypeError, NotImplementedError) as error:
        _explain(error, loss, z, x, "reverse_over_reverse")
        raise
    return out, grad_z, products


def _explain(error: Exception, loss: Callable, z: list, x: list, mode: str) -> None:
    """Raises what tells the kernel's name in the place of JAX's error, if it is about one.

    Under `jit` JAX raises when it compiles, far from the loss: `checks.losses` finds it there.
    """
    if message := refusal(loss, z, x, mode):
        raise TypeError(message) from error


def _finite_differences(loss, z, x, v):
    grads = jax.value_and_grad(loss, (0, 1), has_aux=True)
    out, (grad_z, _) = grads(z, x)
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in z), default=1.0)
    norm = optax.tree.norm(v)
    step = eps ** (1 / 3) * jnp.maximum(1.0, optax.tree.norm(z)) / jnp.where(norm > 0, norm, 1.0)

    def at(sign):
        moved = [a + (sign * step).astype(a.dtype) * b for a, b in zip(z, v, strict=True)]
        return grads(moved, x)[1]

    products = jax.tree.map(
        lambda plus, minus: (plus - minus) / (2 * step).astype(plus.dtype), at(1.0), at(-1.0)
    )
    return out, grad_z, products


PRODUCTS = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "finite_differences": _finite_differences,
}
