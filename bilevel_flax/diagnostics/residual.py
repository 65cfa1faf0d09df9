"""How good is the hypergradient: full directions, the adjoint's residual, a reference.

None of this runs inside a training step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, PyTree, TrainState, Variables
from bilevel_flax.data import FiniteSum, subsample
from bilevel_flax.oracles.evaluate import residual
from bilevel_flax.tree import filter_inexact, is_inexact, norm


def full_oracles(
    problem: Problem,
    variables: Variables,
    inner: FiniteSum,
    outer: FiniteSum,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
) -> Oracles:
    """The five quantities over all of the data.

    Args:
        problem: the problem.
        variables: the point (z, v, x).
        inner: the inner data's minibatches.
        outer: the outer data's.
        model_state: of a stateful problem, held fixed.
        rng: of a stateful problem, the same key for every minibatch.

    Returns:
        Means over the samples; per-sample leaves are dense, [n, ...].

    Raises:
        TypeError: a side is no `FiniteSum`.

    Example:
        >>> import numpy as np, jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - x * batch["b"]) ** 2),
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - batch["b"]) ** 2),
        ... )
        >>> data = bf.data.partition({"b": np.arange(4, dtype=np.float32)}, 2, seed=0)
        >>> point = bf.Variables(jnp.array(3.0), jnp.array(-1.5), jnp.array(2.0))  # z*, v*, x
        >>> oracles = bf.diagnostics.full_oracles(problem, point, data, data)
        >>> float(oracles.inner_grad), float(oracles.outer_grad_inner)
        (0.0, 1.5)
    """
    for name, side in (("inner", inner), ("outer", outer)):
        if not isinstance(side, FiniteSum):
            raise TypeError(
                f"{name} is a {type(side).__name__}, but must be all of the data: "
                "bf.data.partition(arrays, batch_size, seed=0)"
            )
    z, _, x = variables
    visible = rows.map_prefix(problem.per_sample, lambda _: None, jnp.zeros_like, x)
    zeros = jax.tree.map(jnp.zeros_like, Oracles(z, z, x, z, None))._replace(
        outer_grad_outer=visible
    )
    totals = []
    for side, data in (("inner", inner), ("outer", outer)):
        total = zeros
        for i, weight in enumerate(data.weights):
            minibatch = jax.tree.map(lambda leaf, i=i: leaf[i], data.batches)
            batch = Batch(**{side: minibatch})
            updated = _add(problem, total, variables, batch, weight, model_state, rng)
            total = updated._replace(
                **{k: getattr(total, k) for k, v in updated._asdict().items() if v is None}
            )
        totals.append(total)
    return Oracles(*totals[0][:3], *totals[1][3:])


# Compiled once for a problem, however often its residual is asked for.
@functools.partial(jax.jit, static_argnums=0)
def _add(problem, total, variables, batch, weight, model_state, rng) -> Oracles:
    evaluated = oracles.evaluate_all(problem, variables, batch, model_state, (rng, rng)).oracles
    if evaluated.cross_jvp is not None:
        evaluated = evaluated._replace(cross_jvp=rows.densify(evaluated.cross_jvp, variables.outer))

    def plus(new, so_far):
        return None if new is None else so_far + weight.astype(new.dtype) * new

    return jax.tree.map(plus, evaluated, total, is_leaf=lambda node: node is None)


def adjoint_residual(
    problem: Problem,
    variables: Variables,
    inner: FiniteSum,
    outer: FiniteSum,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
    trainable: PyTree = None,
) -> float:
    """‖Hv + ∇₁F‖ / ‖∇₁F‖ over all of the data: 0 at v*, 1 at v = 0.

    Args: as `full_oracles`, and `trainable` as `hypergradient_check`.

    Example:
        >>> import numpy as np, jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - x * batch["b"]) ** 2),
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - batch["b"]) ** 2),
        ... )
        >>> data = bf.data.partition({"b": np.arange(4, dtype=np.float32)}, 2, seed=0)
        >>> point = bf.Variables(jnp.array(3.0), jnp.array(-1.5), jnp.array(2.0))  # z*, v*, x
        >>> float(bf.diagnostics.adjoint_residual(problem, point, data, data))
        0.0
    """
    full = full_oracles(problem, variables, inner, outer, model_state, rng)
    moving = moving_leaves(variables.inner, trainable)

    def chosen(tree):
        return [leaf for leaf, moves in zip(jax.tree.leaves(tree), moving, strict=True) if moves]

    return float(
        residual(Oracles(None, chosen(full.hvp), None, chosen(full.outer_grad_inner), None))
    )


def moving_leaves(inner_params: PyTree, trainable: PyTree) -> tuple[bool, ...]:
    """For each leaf of z, whether it is a float and under True of the prefix `trainable`.

    Raises:
        ValueError: `trainable` is no prefix of z, or leaves nothing to be trained.
    """
    prefix = True if trainable is None else trainable
    try:
        moving = jax.tree.map(
            lambda flag, part: [bool(flag) and is_inexact(leaf) for leaf in jax.tree.leaves(part)],
            prefix,
            inner_params,
        )
    except ValueError as error:
        raise ValueError(
            f"trainable={trainable!r:.80} is not a pytree prefix of inner_params "
            f"({jax.tree.structure(inner_params)}): give booleans in the same nesting"
        ) from error
    moving = tuple(jax.tree.leaves(moving))
    if not any(moving):
        raise ValueError(f"trainable={trainable!r} leaves no parameter: True for those that move")
    return moving


def decoupled_decay(inner_opt_state: PyTree, weight_decay: float, eps: float = 1e-8) -> PyTree:
    """λP⁻¹ of AdamW's z, a tree like z: the `damping` that belongs to decay outside the loss.

    P = 1 / (√ν̂ + ε) is what AdamW multiplies its gradient with.

    Args:
        inner_opt_state: of `optax.adamw`, or a chain with one `optax.scale_by_adam` in it.
        weight_decay: λ.
        eps: ε.

    Raises:
        ValueError: there is no Adam state in it.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> state = optax.adamw(1e-3).init(jnp.zeros(2))
        >>> bf.diagnostics.decoupled_decay(state, weight_decay=0.1, eps=1.0).shape
        (2,)
    """
    states = [
        node
        for node in jax.tree.leaves(
            inner_opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)
        )
        if isinstance(node, optax.ScaleByAdamState)
    ]
    if len(states) != 1:
        raise ValueError(
            f"inner_opt_state holds {len(states)} Adam states, not 1: pass that of optax.adamw"
        )
    # β₂ is not in the state; once training is under way, ν needs no correction any more.
    return jax.tree.map(lambda nu: weight_decay * (jnp.sqrt(nu) + eps), states[0].nu)


def probe_estimator(
    problem: Problem, inner: FiniteSum, outer: FiniteSum, batches: int = 32
) -> Callable[[TrainState], tuple[jax.Array, jax.Array]]:
    """A cheap estimate of `adjoint_residual` for use during training, and of negative curvature.

    The residual of one minibatch is mostly noise: about 1 even at v*. Here Hv and ∇₁F are means
    over k minibatches each, and what the noise adds to the square is taken off again,

        ‖r‖² ≈ ‖mean(H_i v) + mean(∇₁F_j)‖² - Σ_sides (1 - k/N) s² / k,

    with s² the sample variance of a side's k minibatches out of N (unbiased for sampling without
    replacement). With no more than `batches` minibatches a side it is exact.

    Args:
        problem: the problem.
        inner: the inner data's minibatches; evenly spaced ones are used.
        outer: the outer data's.
        batches: k at most; 3 and 1 gradient units each.

    Returns:
        `estimate(state) -> (residual, negative)`: the residual, 0 where the estimate of its square
        is negative, and the share of the inner minibatches on which vᵀHv < 0.

    Example:
        >>> import numpy as np, jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - x * batch["b"]) ** 2),
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - batch["b"]) ** 2),
        ... )
        >>> data = bf.data.partition({"b": np.arange(4, dtype=np.float32)}, 2, seed=0)
        >>> point = bf.Variables(jnp.array(3.0), jnp.array(-1.5), jnp.array(2.0))  # z*, v*, x
        >>> import optax
        >>> estimate = bf.diagnostics.probe_estimator(problem, data, data)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> residual, negative = estimate(solver.init(point.inner, point.outer))
        >>> round(float(residual), 3), float(negative)  # v = 0
        (1.0, 0.0)
    """

    def sample(side: FiniteSum):
        chosen = subsample(side, batches)
        held = jax.device_put((chosen.batches, chosen.weights))
        return held, 1.0 - chosen.num_batches / side.num_batches

    def mean_and_error(quantity, state, chosen, remaining):
        """The mean over a side's minibatches, and the expected square of its error."""
        zeros = jax.tree.map(jnp.zeros_like, state.inner_params)

        def body(carry, one):
            mean, squares, below = carry
            batch, weight = one
            here = quantity(state, batch)
            mean = jax.tree.map(lambda m, q: m + weight.astype(q.dtype) * q, mean, here)
            square = norm(here) ** 2
            v = filter_inexact(state.adjoint)
            curve = jnp.asarray(optax.tree.vdot(v, filter_inexact(here)))
            below = below + weight * (curve < 0)
            return (mean, squares + weight.astype(square.dtype) * square, below), None

        none = jnp.zeros((), chosen[1].dtype)
        (mean, squares, below), _ = jax.lax.scan(body, (zeros, norm(zeros), none), chosen)
        count = len(chosen[1])
        variance = (squares - norm(mean) ** 2) * count / max(count - 1, 1)
        return mean, remaining * variance / count, below

    def curved(state, batch):
        return oracles.hvp(problem, state.variables, batch, state.model_state, state.rng)

    def target(state, batch):
        z, _, x = state.variables
        return oracles.outer_grads(problem, z, x, batch, state.model_state, state.rng)[0]

    (inner_chosen, inner_remaining), (outer_chosen, outer_remaining) = sample(inner), sample(outer)

    @jax.jit
    def estimate(state, inner_chosen, outer_chosen):
        product, product_error, below = mean_and_error(curved, state, inner_chosen, inner_remaining)
        gradient, gradient_error, _ = mean_and_error(target, state, outer_chosen, outer_remaining)
        square = norm(jax.tree.map(jnp.add, product, gradient)) ** 2
        square = jnp.maximum(square - product_error - gradient_error, 0.0)
        # The noise is in ‖∇₁F‖ as well; where it is all there is, nothing can be taken off.
        size = norm(gradient) ** 2
        size = jnp.where(size > gradient_error, size - gradient_error, size)
        relative = jnp.sqrt(square / jnp.where(size > 0, size, 1.0))
        return jnp.where(size > 0, relative, 0.0), below

    return lambda state: estimate(state, inner_chosen, outer_chosen)
