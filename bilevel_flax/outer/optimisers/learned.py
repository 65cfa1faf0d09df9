"""An optimiser of z with settings that are learned: learning rates, decay, momentum as x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from bilevel_flax.base import PyTree


def learned_optimizer(
    make: Callable[[PyTree], optax.GradientTransformation], outer_params: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Z's optimiser as a function of x, for `bf.unrolled`, which differentiates through it.

    Args:
        make: `make(outer_params) -> optimiser`, e.g. `lambda x: optax.sgd(jnp.exp(x["rate"]))`; the
            tree of its state must not depend on the values.
        outer_params: any x, for that tree.

    Returns:
        An optimiser that is handed x as `outer_params=`, as solvers do.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> x = {"rate": jnp.log(0.25)}
        >>> inner = bf.outer.learned_optimizer(lambda x: optax.sgd(jnp.exp(x["rate"])), x)
        >>> loss = lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum()
        >>> solver = bf.unrolled(
        ...     bf.Problem(loss, loss), inner=inner, outer=optax.sgd(1.0), inner_steps=1
        ... )
        >>> batch = bf.Batch(jnp.ones(1), jnp.ones(1))
        >>> state, info = solver.update(solver.init(jnp.zeros(1), x), batch)
        >>> float(info.norms.outer)  # (1 - z_1) dz_1/dx = 3/4 · 1/4
        0.1875
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        step = optax.with_extra_args_support(make(extra_args["outer_params"]))
        return step.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(make(outer_params).init, update)
