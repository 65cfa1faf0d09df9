"""Unrolled differentiation: backprop through K steps of the inner optimiser.

    z_0 = z,   z_{k+1} = z_k - ρ ∇₁G_k(z_k, x)      K times, on fresh minibatches
    x ← x - γ d/dx F(z_K(x), x),                    z ← z_K

z_0 and the optimiser's state at the start are held fixed (the truncated, warm-started form), so
the gradient's bias does not vanish with the step sizes, only with K; or z_0 is a function of x (the
meta-learning form, exact). There is no adjoint: v stays 0 and the adjoint residual is 1.

Of every step its start alone is kept, and ∇₁G is differentiated in mixed mode
(`oracles.differentiable_inner_grad`), so that memory does not grow with K by a step's activations.

References:
    C. Finn, P. Abbeel, S. Levine. Model-agnostic meta-learning for fast adaptation of deep
    networks. ICML 2017 (`initial`); Z. Li, F. Zhou, F. Chen, H. Li. Meta-SGD: Learning to learn
    quickly for few-shot learning. 2017 (`initial`, and step sizes that are x).
    D. Maclaurin, D. Duvenaud, R. P. Adams. Gradient-based hyperparameter optimization through
    reversible learning. ICML 2015.
    A. Shaban, C.-A. Cheng, N. Hatch, B. Boots. Truncated back-propagation for bilevel
    optimization. AISTATS 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks, oracles
from bilevel_flax.base import BilevelSolver, Problem, PyTree
from bilevel_flax.checks import check_count
from bilevel_flax.minibatches import scale
from bilevel_flax.solvers.keywords import Common, takes
from bilevel_flax.solvers.nested.frame import StepReport, nested
from bilevel_flax.solvers.nested.sampled_oracles import SampledOracles, first
from bilevel_flax.solvers.step import tolerant
from bilevel_flax.tree import filter_inexact

# Where a gradient is smaller than this its square, and what optimisers make of it, is no float32.
_SMALLEST = 1e-15


def differentiable(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser with finite derivatives at a gradient of 0.

    Roots of squares, as in Adam and in clipping by a norm, have none there (0 · ∞): theirs are
    taken beside it. The steps are the optimiser's own, bit for bit.
    """
    inner = tolerant(transform)

    def update(updates, state, params=None, **extra_args):
        def away_from_zero(g):
            shift = jnp.where(jnp.abs(g) < _SMALLEST, _SMALLEST - g, 0)
            return g + jax.lax.stop_gradient(shift.astype(g.dtype))

        def join(value, slope):
            if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
                return value
            return jax.lax.stop_gradient(value) + (slope - jax.lax.stop_gradient(slope))

        exact = inner.update(updates, state, params, **extra_args)
        beside = inner.update(jax.tree.map(away_from_zero, updates), state, params, **extra_args)
        return jax.tree.map(join, exact, beside)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def check_same(initial: PyTree, z: PyTree) -> None:
    """Raises unless `initial(x)` is like z.

    Raises:
        ValueError: names the two.
    """
    leaves = [
        {
            jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (initial, z)
    ]
    names = [name for name in leaves[0] | leaves[1] if leaves[0].get(name) != leaves[1].get(name)]
    fix = "it is where z starts, so give it z's tree, shapes and dtypes"
    if names:
        name = names[0]
        given, wanted = (side.get(name, "nothing") for side in leaves)
        raise ValueError(
            f"initial(outer_params) returned {given} as {name or 'its array'}, but inner_params "
            f"are {wanted} there: {fix}"
        )
    if jax.tree.structure(initial) != jax.tree.structure(z):
        raise ValueError(
            "initial(outer_params) returned the leaves in other nodes than inner_params are: " + fix
        )


@takes(Common)
def unrolled(
    problem: Problem,
    *,
    inner_steps: int = 10,
    initial: Callable[[PyTree], PyTree] | None = None,
    **common: Unpack[Common],
) -> BilevelSolver:
    """Backprop through K inner steps; 3K + 1 gradient units (K gradients, HVPs and cross-JVPs).

    Memory grows with K by the parameters and the optimiser's state of every step alone; its time
    has one more gradient a step, for the recomputation.

    Args:
        problem: the bilevel problem.
        inner_steps: K, at least 1.
        initial: `initial(outer_params) -> z_0`, differentiable, with z's tree: every update starts
            there, with a fresh optimiser (MAML: `lambda x: x["initial"]`). None: where the update
            before ended, held fixed.
        **common: optimisers and weights, see `solvers.keywords`. `inner` is differentiated (SGD,
            momentum, Adam ...), in x too if it takes `outer_params=` (a learning rate to be
            learned); `outer` is no row-sparse one.

    Returns:
        A solver with `batches` (K, 1).

    Raises:
        ValueError: `inner_steps` below 1, weights that are no shares.
        TypeError: `initial` is no function.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> step = optax.sgd(0.5)
        >>> solver = bf.unrolled(problem, inner=step, outer=optax.sgd(1.0), inner_steps=2)
        >>> state = solver.init(jnp.zeros(1), jnp.zeros(1))
        >>> state, info = solver.update(state, bf.Batch(jnp.zeros((2, 1)), jnp.full((1, 1), 4.0)))
        >>> state.outer_params.tolist()  # dz_2/dx = 3/4
        [3.0]
    """
    check_count("inner_steps", inner_steps)
    if not (initial is None or callable(initial)):
        raise TypeError(f"initial={initial!r:.60} must be a function, outer_params -> z_0, or None")
    common["inner"] = differentiable(checks.optimizer("inner", common.get("inner")))

    def start(sampled: SampledOracles, state, x):
        if initial is None:
            return state.inner_params, state.inner_opt_state
        z = initial(x)
        check_same(z, state.inner_params)
        return z, sampled.transforms.inner.init(filter_inexact(z))

    def sees_outer(sampled: SampledOracles, state, minibatches, x):
        return sampled.inner_sgd(*start(sampled, state, x), x, minibatches)[0]

    def step(sampled: SampledOracles, state, inner, outer):
        sampled, last = dataclasses.replace(sampled, differentiated=True), first(outer)

        def unroll(x):
            z_end, *more = sampled.inner_sgd(*start(sampled, state, x), x, inner)
            return z_end, sampled.state_for_outer(more[1][1]), more

        out, d_x, (z_end, (opt_state, inner_out, norms)) = oracles.unrolled_value_and_grad(
            problem, unroll, state.outer_params, last.data, last.rng
        )
        state = state.replace(inner_params=z_end, inner_opt_state=opt_state)
        zero, one = jnp.float32(0.0), jnp.float32(1.0)
        d_x = scale(d_x, last.factor)
        return state, StepReport(inner_out, out, norms, zero, one, d_x)

    return nested(
        problem,
        step,
        name="unrolled",
        batches=(inner_steps, 1),
        units=3 * inner_steps + 1,
        row_directions=False,
        sees_outer=sees_outer,
        solves=False,
        **common,
    )
