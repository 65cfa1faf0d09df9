"""How good is the hypergradient: full directions, the adjoint's residual, a CG reference.

None of this runs inside a training step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from bilevel_flax import oracles, rows
from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Variables
from bilevel_flax.data import FiniteSum
from bilevel_flax.single_loop import norm, residual
from bilevel_flax.solvers.soba import directions


class HypergradientCheck(NamedTuple):
    """D_x at the tracked adjoint beside the implicit gradient at the same (z, x).

    Attributes:
        cosine: between the two; 1 is right.
        relative_error: ‖D_x - reference‖ / ‖reference‖.
        adjoint_residual: ‖Hv + ∇₁F‖ / ‖∇₁F‖ of the tracked adjoint.
        reference_residual: the same of the reference's adjoint: how far CG came.
    """

    cosine: jax.Array
    relative_error: jax.Array
    adjoint_residual: jax.Array
    reference_residual: jax.Array


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
    """

    @jax.jit
    def add(total, variables, batch, weight):
        found = oracles.evaluate_all(problem, variables, batch, model_state, (rng, rng)).oracles
        if found.cross_jvp is not None:
            found = found._replace(cross_jvp=rows.densify(found.cross_jvp, variables.outer))

        def plus(new, so_far):
            return None if new is None else so_far + weight.astype(new.dtype) * new

        return jax.tree.map(plus, found, total, is_leaf=lambda node: node is None)

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
            kept = add(total, variables, Batch(**{side: minibatch}), weight)
            total = kept._replace(
                **{k: getattr(total, k) for k, v in kept._asdict().items() if v is None}
            )
        totals.append(total)
    return Oracles(*totals[0][:3], *totals[1][3:])


def adjoint_residual(
    problem: Problem,
    variables: Variables,
    inner: FiniteSum,
    outer: FiniteSum,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
) -> float:
    """‖Hv + ∇₁F‖ / ‖∇₁F‖ over all of the data: 0 at v*, 1 at v = 0.

    Args: as `full_oracles`.
    """
    return float(residual(full_oracles(problem, variables, inner, outer, model_state, rng)))


def hypergradient_check(
    problem: Problem,
    variables: Variables,
    batch: Batch,
    *,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
    damping: float = 0.0,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> HypergradientCheck:
    """Compares D_x with the implicit gradient at the same z and x, on one held batch.

    The reference solves (H + damping·I) v = -∇₁F by conjugate gradients, which needs H positive
    definite: `reference_residual` far above `tolerance` says that it is not, or that more
    iterations are needed.

    Args:
        problem: the problem.
        variables: the point (z, v, x).
        batch: one inner and one outer batch, as large as fits; not those of the last step.
        model_state: of a stateful problem, held fixed.
        rng: of a stateful problem.
        damping: δ >= 0, added to H in the reference only.
        max_iterations: CG steps at most.
        tolerance: CG stops at this relative residual.

    References:
        F. Pedregosa. Hyperparameter optimization with approximate gradient. ICML 2016.
    """

    @jax.jit
    def check(variables):
        rngs = (rng, rng)
        found = oracles.evaluate_all(problem, variables, batch, model_state, rngs).oracles

        def product(v):
            point = variables._replace(adjoint=v)
            curved = oracles.hvp(problem, point, batch.inner, model_state, rng)
            return jax.tree.map(lambda hv, u: hv + damping * u, curved, v)

        target = jax.tree.map(jnp.negative, found.outer_grad_inner)
        solution, _ = cg(
            product, target, x0=variables.adjoint, tol=tolerance, maxiter=max_iterations
        )
        at_solution = variables._replace(adjoint=solution)
        exact = oracles.evaluate_all(problem, at_solution, batch, model_state, rngs).oracles
        ours = rows.densify(directions(found).outer, variables.outer)
        reference = rows.densify(directions(exact).outer, variables.outer)
        inner = sum(
            jnp.vdot(a, b)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
        )
        difference = norm(jax.tree.map(jnp.subtract, ours, reference))
        return HypergradientCheck(
            cosine=inner / (norm(ours) * norm(reference)),
            relative_error=difference / norm(reference),
            adjoint_residual=residual(found),
            reference_residual=residual(exact),
        )

    return check(variables)
