"""Products with second derivatives of G, each beside the gradient that it comes with.

`Problem.derivatives` chooses among three ways to ∇₁G, ∇²₁₁G v and ∇²₂₁G v; the package's docstring
tells them apart. A `Microbatched` loss has each quantity summed over parts of the minibatch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import Problem, PyTree, Variables
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.microbatches import in_parts, whole
from bilevel_flax.oracles.stops import explained
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

    with explained("inner_loss", loss, z, x, "forward_over_reverse"):
        (grad_z, _), products, out = jax.jvp(grads, (z,), (v,), has_aux=True)
    return out, grad_z, products


def _reverse_over_reverse(loss, z, x, v):
    def product(z, x):
        out, grad_z = jax.value_and_grad(loss, has_aux=True)(z, x)
        return optax.tree.vdot(grad_z, v), (grad_z, out)

    with explained("inner_loss", loss, z, x, "reverse_over_reverse"):
        products, (grad_z, out) = jax.grad(product, (0, 1), has_aux=True)(z, x)
    return out, grad_z, products


def _finite_differences(loss, z, x, v):
    grads = jax.value_and_grad(loss, (0, 1), has_aux=True)
    with explained("inner_loss", loss, z, x):
        out, (grad_z, _) = grads(z, x)
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in z), default=1.0)
    norm = optax.tree.norm(v)
    step = eps ** (1 / 3) * jnp.maximum(1.0, optax.tree.norm(z)) / jnp.where(norm > 0, norm, 1.0)

    def at(sign):
        moved = [a + (sign * step).astype(a.dtype) * b for a, b in zip(z, v, strict=True)]
        return grads(moved, x)[1]

    def product(plus, minus):
        # Of v = 0 it is 0: two gradients at one point may be rounded in two ways.
        return jnp.where(norm > 0, (plus - minus) / (2 * step).astype(plus.dtype), 0)

    products = jax.tree.map(product, at(1.0), at(-1.0))
    return out, grad_z, products


PRODUCTS = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "finite_differences": _finite_differences,
}
