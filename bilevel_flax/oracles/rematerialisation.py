"""What rematerialised blocks keep of themselves, changed in a loss that is written already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from bilevel_flax.base import Problem
from bilevel_flax.oracles.jaxprs import rewritten
from bilevel_flax.oracles.wrapped_loss import wrap_losses

# Those that a name is enough for, most kept first.
POLICIES = (
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "nothing_saveable",
)


def keep(problem: Problem, policy: str) -> Problem:
    """Rematerialised blocks (`jax.checkpoint`, `nn.remat`) in the losses keep what a policy says.

    Args:
        problem: the problem.
        policy: a name in `jax.checkpoint_policies`: "everything_saveable" (nothing is computed
            twice), "dots_saveable" (the outputs of matrix products are not),
            "dots_with_no_batch_dims_saveable" (those of attention are), "nothing_saveable".

    Raises:
        ValueError: JAX has no policy of this name, or one that needs more than a name.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> block = jax.checkpoint(lambda z: jnp.sin(z @ z))
        >>> loss = lambda z, x, batch: ((block(z) - x) ** 2).mean()
        >>> problem = keep(bf.Problem(loss, loss), "dots_saveable")
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} must be one of {', '.join(POLICIES)}")
    chosen = getattr(jax.checkpoint_policies, policy)

    def change(eqn):
        blocks = "policy" in eqn.params and "jaxpr" in eqn.params
        return eqn.replace(params={**eqn.params, "policy": chosen}) if blocks else eqn

    def transform(loss: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args):
            leaves, tree = jax.tree.flatten(args)
            of_leaves = lambda *leaves: loss(*tree.unflatten(leaves))
            closed, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
            out = jaxpr_as_fun(rewritten(closed, change))(*leaves)
            return jax.tree.unflatten(jax.tree.structure(shapes), out)

        return kept

    return wrap_losses(problem, transform)
