"""An inner problem given by its condition c(z, x) = 0 instead of a loss.

Whatever works on losses works on this one: a number whose gradient in z is c and in x is 0,

    ∇₁G := c        ∇²₁₁G v := Jᵀv        ∇²₂₁G v := (∂c/∂x)ᵀ v        J = ∂c/∂z

Backprop of ⟨∇₁G, v⟩ (`derivatives="reverse_over_reverse"`) gives the last two by one vjp of c. J
need not be symmetric, and forward mode would give Jv in the place of Jᵀv.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base.wrapped_loss import WrappedLoss


@dataclasses.dataclass(frozen=True, eq=False)
class Condition(WrappedLoss):
    """`condition(inner_params, outer_params, batch) -> tree like z`, which is 0 at z*, as a loss.

    Its value is the Euclidean norm of the condition: the residual of z.
    """

    def __call__(self, z: Any, x: Any, batch: Any, *context: Any) -> Any:
        """The residual (and, where there is a model state, `Aux`).

        Raises:
            TypeError: the condition's output differs from z; names the first leaf that does.
        """
        out = self.loss(z, x, batch, *context)
        stateful = bool(context) and isinstance(out, tuple) and len(out) == 2
        value, aux = out if stateful else (out, None)
        residual = _potential(*_float_leaves(z, value))
        return (residual, aux) if stateful else residual


def is_condition(loss: Any) -> bool:
    """Whether a loss, under all that is wrapped around it, is a condition."""
    return isinstance(loss, WrappedLoss) and (
        isinstance(loss, Condition) or is_condition(loss.loss)
    )


@jax.custom_vjp
def _potential(z: list, condition: list) -> jax.Array:
    """A number with the gradient `condition` in z, and none in `condition`."""
    del z
    return _norm(condition)


def _norm(leaves: list) -> jax.Array:
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    return optax.tree.norm(jax.lax.stop_gradient(wide))


_potential.defvjp(
    lambda z, condition: (_norm(condition), condition),
    lambda condition, g: ([g.astype(leaf.dtype) * leaf for leaf in condition], None),
)


def _float_leaves(z: Any, value: Any) -> tuple[list, list]:
    """The float leaves of z, and the condition's opposite to them."""
    if jax.tree.structure(z) != jax.tree.structure(value):
        raise TypeError(
            f"condition returned the tree {jax.tree.structure(value)}, but inner_params is "
            f"{jax.tree.structure(z)}: return one number for each entry of inner_params"
        )
    chosen, opposite = [], []
    for (path, leaf), found in zip(
        jax.tree.leaves_with_path(z), jax.tree.leaves(value), strict=True
    ):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        given, wanted = ((jnp.result_type(a), list(jnp.shape(a))) for a in (found, leaf))
        if given != wanted:
            raise TypeError(
                f"condition{jax.tree_util.keystr(path)} is {given[0]}{given[1]}, but "
                f"inner_params{jax.tree_util.keystr(path)} is {wanted[0]}{wanted[1]}: return a "
                "tree with the shapes and dtypes of inner_params"
            )
        chosen.append(leaf)
        opposite.append(jnp.asarray(found))
    return chosen, opposite
