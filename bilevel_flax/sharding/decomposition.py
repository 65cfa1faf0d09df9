"""Whether the loss of a minibatch is the mean of the losses of its shares.

One reduction a step needs that. It holds for means over examples plus terms without examples, not
for weights normalised over the minibatch, contrastive losses or BatchNorm without an `axis_name`.
Losses that draw random numbers (dropout) draw others in each share, so that no check can tell.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bilevel_flax.base import Batch, Problem, PyTree
from bilevel_flax.base.condition import is_condition
from bilevel_flax.oracles import inner_grad, losses
from bilevel_flax.oracles.mixed_precision import is_lowered
from bilevel_flax.oracles.weighted_sums import NoMeanError, amount
from bilevel_flax.sharding.mesh import BATCH_AXES, batch_share
from bilevel_flax.sharding.named_axes import bound
from bilevel_flax.tree import filter_inexact, is_inexact

_TOLERANCE = 1e-4
_COARSE = 1e-2  # of losses computed in bfloat16


def decomposition(
    problem: Problem,
    mesh: Mesh,
    inner_params: PyTree,
    outer_params: PyTree,
    batch: Batch,
    *,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
) -> str:
    """Why the losses do not decompose over the mesh's shares of a minibatch; "" where they do.

    Both losses are evaluated once on the whole and once in shares.

    Args:
        problem: as the user wrote it.
        mesh: from `make_mesh`.
        inner_params: z.
        outer_params: x.
        batch: a pair of minibatches.
        model_state: of a stateful problem.
        rng: its key.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> mean = lambda z, x, batch: jnp.mean((z - batch) ** 2)
        >>> mesh = bf.sharding.make_mesh("data=1", devices=jax.devices()[:1])
        >>> batch = bf.Batch(jnp.ones(8), jnp.ones(8))
        >>> problem = bf.Problem(mean, mean)
        >>> bf.sharding.decomposition(problem, mesh, jnp.zeros(()), jnp.zeros(()), batch)
        ''
    """
    if batch_share(mesh) == 1:
        return ""

    def evaluated(name, side, z, x, model_state, rng):
        make = losses.inner if name == "inner_loss" else losses.outer

        def loss(part):
            if name == "inner_loss" and is_condition(problem.inner_loss):
                # Its norm is no mean of the shares' norms; its component in a direction is one.
                condition = filter_inexact(inner_grad(problem, z, x, part, model_state, rng))
                along = optax.tree.random_like(jax.random.PRNGKey(0), condition)
                value = jnp.asarray(optax.tree.vdot(condition, along))
            else:
                value, z_split, x_split, *_ = make(problem, z, x, part, model_state, rng)
                value = value(z_split.leaves, x_split.leaves)[0]
            value = value.astype(jnp.float32)
            count = amount(problem, name, (z, x), part, (model_state, rng), "the mesh")
            return value, jnp.float32(1.0) if count is None else count.astype(jnp.float32)

        shares = tuple(mesh.shape[axis] for axis in BATCH_AXES)
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(*shares, -1, *leaf.shape[1:]) if leaf.ndim else leaf, side
        )
        in_axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, side)
        each = loss
        for axis in reversed(BATCH_AXES):
            each = jax.vmap(each, (in_axes,), axis_name=axis)
        values, weight = each(parts)
        # Where a share is padding alone its loss may be anything.
        values = jnp.where(weight > 0, values * weight, 0.0)
        return bound(loss, BATCH_AXES)(side)[0], values.sum() / weight.sum()

    for name, side in (("inner_loss", batch.inner), ("outer_loss", batch.outer)):
        run = jax.jit(evaluated, static_argnums=0)
        try:
            whole, mean = map(float, run(name, side, inner_params, outer_params, model_state, rng))
        except NoMeanError as error:
            return str(error)
        coarse = is_lowered(getattr(problem, name)) or any(
            leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(inner_params) if is_inexact(leaf)
        )
        limit = (_COARSE if coarse else _TOLERANCE) * max(abs(whole), 1e-6)
        if not abs(whole - mean) <= limit:
            return (
                f"{name} of a minibatch is {whole:.6g}, but the mean over its "
                f"{batch_share(mesh)} shares is {mean:.6g}"
            )
    return ""
