"""SPABA: PAGE on the three directions of a bilevel problem. SRBA with restarts at random.

At each step, with probability p the full directions, else SARAH's difference on one inner and one
outer minibatch B, both points u = (z, v, x) on the same one:

    d_k = D(u_k)  or  d_k = d_{k-1} + D_B(u_k) - D_B(u_{k-1})

The step of the next full pass is drawn ahead, from the geometric law that the coin flips give, so
that the loop can stop there and run the pass in chunks (`refresh`).

References:
    T. Chu, D. Xu, W. Yao, J. Zhang. SPABA: a single-loop and probabilistic stochastic bilevel
    algorithm achieving optimal sample complexity. ICML 2024.
    Z. Li, H. Bao, X. Zhang, P. Richtárik. PAGE: a simple and optimal probabilistic gradient
    estimator for nonconvex optimization. ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp

from bilevel_flax.base import BilevelSolver, Problem
from bilevel_flax.checks import check_sum
from bilevel_flax.per_sample import takes_rows
from bilevel_flax.solvers.keywords import CommonWithAdjoint, takes
from bilevel_flax.solvers.single_loop import single_loop
from bilevel_flax.solvers.srba import estimator


def geometric_schedule(probability: float, seed: int) -> Callable[[jax.Array], jax.Array]:
    """`schedule(step) -> int32`, step + G with P(G = k) = p (1 - p)^(k - 1), k = 1, 2, ...

    A pure function of the seed and the step: a resumed run draws the same.
    """
    if probability == 1:
        return lambda step: step + 1
    # The inverse of the distribution function; float32 uniforms are never 0 here.
    scale = 1 / math.log1p(-probability)

    def schedule(step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        uniform = jax.random.uniform(key, dtype=jnp.float32, minval=jnp.finfo(jnp.float32).tiny)
        waits = jnp.floor(jnp.log(uniform) * jnp.float32(scale))
        return step + 1 + jnp.minimum(waits, 1e9).astype(jnp.int32)

    return schedule


@takes(CommonWithAdjoint)
def spaba(
    problem: Problem,
    *,
    num_inner_batches: int,
    num_outer_batches: int,
    probability: float,
    seed: int = 0,
    **common: Unpack[CommonWithAdjoint],
) -> BilevelSolver:
    """SPABA with an Optax optimiser for each variable (8 gradient units a step).

    Args:
        problem: as for `srba`.
        num_inner_batches: N, minibatches of the inner data.
        num_outer_batches: M, minibatches of the outer data.
        probability: p in (0, 1], of a full pass before a step; about 1 / (N + M).
        seed: what the steps of the full passes are drawn from.
        **common: optimisers and weights, see `solvers.keywords`.

    Returns:
        A `BilevelSolver` whose `refresh` must be run when `next_refresh` says so, as for `srba`.

    Raises:
        ValueError: `probability` outside (0, 1], a number of minibatches below 1, weights of
            another length.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.contrib.spaba(
        ...     problem,
        ...     num_inner_batches=8,
        ...     num_outer_batches=4,
        ...     probability=1 / 12,
        ...     inner=optax.sgd(0.1),
        ...     outer=optax.sgd(0.1),
        ... )
        >>> state = solver.init(jnp.array(0.0), jnp.array(0.0))
        >>> int(solver.next_refresh(state))  # a full pass is due before the first step
        0
    """
    check_sum(problem, "spaba", num_inner_batches, num_outer_batches, common)
    if not 0 < probability <= 1:
        raise ValueError(
            f"probability must lie in (0, 1], got {probability!r}: "
            f"1 / (N + M) is {1 / (num_inner_batches + num_outer_batches):.3g} here"
        )
    recursion = estimator(
        problem,
        num_inner_batches,
        num_outer_batches,
        geometric_schedule(probability, seed),
        lazy=takes_rows(common),
    )
    return single_loop(problem, recursion, name="spaba", **common)
