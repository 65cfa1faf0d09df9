"""Losses that reduce over named axes (BatchNorm's `axis_name`), wherever they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevel_flax.base import Problem
from bilevel_flax.oracles.wrapped_loss import wrap_losses
from bilevel_flax.sharding.mesh import BATCH_AXES


def is_bound(name: str) -> bool:
    """Whether `lax.psum(..., name)` means something here."""
    try:
        lax.axis_index(name)
    except NameError:
        return False
    return True


def bound(loss: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """The loss with these axes bound: to themselves where they are, else to axes of size 1.

    Args:
        loss: any function of pytrees.
        names: axes that it may name.

    Example:
        >>> mean = bound(lambda x: lax.pmean(x.mean(), "data"), ("data",))
        >>> float(mean(jnp.arange(3.0)))
        1.0
    """

    def call(*args):
        run = loss
        for name in names:
            if not is_bound(name):
                run = _alone(run, name)
        return run(*args)

    return call


def _alone(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args):
        mapped = jax.vmap(lambda _: function(*args), axis_name=name)
        return jax.tree.map(lambda leaf: leaf[0], mapped(jnp.zeros(1)))

    return run


def whole(problem: Problem) -> Problem:
    """The problem with its losses on whole minibatches: mesh axes that they name have one member.

    For a model with `BatchNorm(axis_name=BATCH_AXES)` on one device, or where XLA's partitioner
    cuts the minibatch: its statistics are those of the whole either way.

    Args:
        problem: whose losses may name the axes `data` and `fsdp`.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> mean = lambda values: jax.lax.pmean(values.mean(), bf.sharding.BATCH_AXES)
        >>> centred = lambda z, x, b: mean((z - b + mean(b)) ** 2)
        >>> problem = bf.sharding.whole(bf.Problem(centred, centred))
        >>> float(problem.inner_loss(1.0, None, jnp.ones(4)))
        1.0
    """
    return wrap_losses(problem, lambda loss: bound(loss, BATCH_AXES))
