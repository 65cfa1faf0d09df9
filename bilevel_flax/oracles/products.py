"""Three ways to ∇₁G, ∇²₁₁G v and ∇²₂₁G v; the package's docstring tells them apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import PyTree


def check_adjoint(z: PyTree, v: PyTree) -> None:
    """Raises unless v has z's tree, shapes and dtypes.

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
        if jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
            raise ValueError(
                f"the adjoint's leaf {jax.tree_util.keystr(path)} is "
                f"{jnp.result_type(b)}{jnp.shape(b)}, inner_params' is "
                f"{jnp.result_type(a)}{jnp.shape(a)}: v has z's shapes and dtypes exactly"
            )


def _forward_over_reverse(loss, z, x, v):
    def grads(z):
        (value, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(z, x)
        return grads, (value, aux)

    try:
        (grad_z, _), products, (value, aux) = jax.jvp(grads, (z,), (v,), has_aux=True)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "inner_loss uses a custom_vjp function that forward mode cannot differentiate: "
            'set Problem(..., derivatives="reverse_over_reverse")'
        ) from error
    return (value, aux), grad_z, products


def _reverse_over_reverse(loss, z, x, v):
    def product(z, x):
        (value, aux), grad_z = jax.value_and_grad(loss, has_aux=True)(z, x)
        return optax.tree.vdot(grad_z, v), (grad_z, value, aux)

    products, (grad_z, value, aux) = jax.grad(product, argnums=(0, 1), has_aux=True)(z, x)
    return (value, aux), grad_z, products


def _finite_differences(loss, z, x, v):
    grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), (grad_z, _) = grads(z, x)
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in z), default=1.0)
    norm = optax.tree.norm(v)
    step = eps ** (1 / 3) * jnp.maximum(1.0, optax.tree.norm(z)) / jnp.where(norm > 0, norm, 1.0)

    def at(sign):
        moved = [a + (sign * step).astype(a.dtype) * b for a, b in zip(z, v, strict=True)]
        return grads(moved, x)[1]

    products = jax.tree.map(
        lambda plus, minus: (plus - minus) / (2 * step).astype(plus.dtype), at(1.0), at(-1.0)
    )
    return (value, aux), grad_z, products


PRODUCTS = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "finite_differences": _finite_differences,
}
