"""Is D_x the hypergradient? A comparison with the implicit gradient at the same (z, x).

    D_x = ∇²₂₁G v + ∇₂F      with the tracked v, and with the v that solves  ∇²₁₁G v = -∇₁F

Both are means over the same held minibatches, each evaluated as in a training step: BatchNorm on
that minibatch, one dropout key for each, the model state as it is. Few parameters: the Hessian is
formed and the system solved exactly. Many: MINRES, matrix-free, one Hessian-vector product with
every held minibatch an iteration. A condition (`Problem.from_condition`) has Jᵀ in the place of the
Hessian, which need not be symmetric: many parameters then take GMRES.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax import checks, oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Problem, PyTree, TrainState, Variables
from bilevel_flax.base.condition import is_condition
from bilevel_flax.data import FiniteSum
from bilevel_flax.diagnostics import adjoint_systems as systems
from bilevel_flax.diagnostics.adjoint_systems import flat, mean_over, unflat
from bilevel_flax.diagnostics.place import place
from bilevel_flax.diagnostics.residual import moving_leaves
from bilevel_flax.diagnostics.symmetry import SymmetryCheck, check_symmetry
from bilevel_flax.minibatches import example_mask
from bilevel_flax.solvers.nested import minres as krylov
from bilevel_flax.tree import filter_inexact, norm, ratio

METHODS = ("auto", "dense", "minres", "gmres")
_DENSE_BELOW = 500  # parameters; as many products as MINRES is allowed to take, give or take


class HypergradientCheck(NamedTuple):
    """D_x at the tracked adjoint beside the implicit gradient at the same (z, x).

    Attributes:
        cosine: between the two; 1 is right. NaN where one of them is 0.
        relative_error: ‖D_x - reference‖ / ‖reference‖.
        norm_ratio: ‖D_x‖ / ‖reference‖; below 1 where v has not grown to its length yet.
        adjoint_residual: ‖Hv + ∇₁F‖ / ‖∇₁F‖ of the tracked adjoint on the held minibatches.
        reference_residual: the same of the reference's adjoint: how well its system was solved.
        converged: whether that is below the tolerance. Where not, MINRES was stopped early or
            the system has no solution (a singular H); the reference is then the least-squares
            solution of smallest length, or the best in the Krylov space.
        smallest_curvature: the smallest eigenvalue of H + damping (dense), or the smallest that
            the Krylov space saw, which is an upper bound. Of a condition the smallest real part;
            NaN with GMRES, which sees none.
        largest_curvature: likewise the largest, a lower bound. SGD on v needs steps below 2 over
            it.
        iterations: products with H that the reference took (GMRES: that it was allowed).
        method: "dense", "minres" or "gmres".
        symmetry: whether the inner gradient is one, on the first held minibatch. Where it is not,
            a warning has said so, and D_x and the reference are wrong alike.
        direction: D_x, in x's tree, dense. Rows of x that no held minibatch visits are 0.
        reference: the implicit gradient, likewise.

    Example:
        >>> import numpy as np, jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - x * batch["b"]) ** 2),
        ...     lambda z, x, batch: 0.5 * jnp.mean((z - batch["b"]) ** 2),
        ... )
        >>> data = bf.data.partition({"b": np.arange(4, dtype=np.float32)}, 2, seed=0)
        >>> point = bf.Variables(jnp.array(3.0), jnp.array(-1.5), jnp.array(2.0))  # z*, v*, x
        >>> check = bf.diagnostics.hypergradient_check(problem, point, data, data)
        >>> check.method, check.converged, round(check.cosine, 3)
        ('dense', True, 1.0)
    """

    cosine: float
    relative_error: float
    norm_ratio: float
    adjoint_residual: float
    reference_residual: float
    converged: bool
    smallest_curvature: float
    largest_curvature: float
    iterations: int
    method: str
    symmetry: SymmetryCheck
    direction: PyTree
    reference: PyTree

    @property
    def negative_curvature(self) -> bool:
        """Whether H has a negative eigenvalue, rounding apart.

        z is then at no minimum of G, h is not differentiable there by the implicit function
        theorem, and v's own iteration has a direction in which it grows.
        """
        return self.smallest_curvature < -1e-5 * abs(self.largest_curvature)


def hypergradient_check(
    problem: Problem,
    point: TrainState | Variables,
    inner: FiniteSum | Sequence[Any] | Batch | Any,
    outer: FiniteSum | Sequence[Any] | Any = None,
    *,
    model_state: PyTree = None,
    rng: jax.Array | None = None,
    damping: float | PyTree = 0.0,
    method: str = "auto",
    warm_start: bool = False,
    trainable: PyTree = None,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
) -> HypergradientCheck:
    """Compares D_x at the tracked adjoint with the implicit gradient, on held minibatches.

    The tracked v solves the system of all data, the reference that of the held minibatches: with
    few of them, and more parameters than examples, the two differ even for a perfect v. Pass all
    minibatches of a small data set (`task.inner`, a `FiniteSum`), and as many as time allows of
    a large one (`data.subsample(task.inner, 64)`).

    AdamW decays z outside of G. Its z solves P∇₁G + λz = 0, and the system that belongs to it is
    (H + λP⁻¹)v = -∇₁F: pass `damping=diagnostics.decoupled_decay(state.inner_opt_state, λ)`.

    Args:
        problem: the problem; stateful and per-sample ones too.
        point: a `TrainState` (its model state and key are used), or `Variables` (z, v, x).
        inner: a `FiniteSum`, a list of minibatches, or one minibatch (anything else); or a
            `Batch` with both sides, one minibatch each.
        outer: the same for F's data; None after a `Batch`.
        model_state: of a stateful problem, held fixed; None: the state's.
        rng: of a stateful problem, folded with each minibatch's number; None: the state's.
        damping: δ >= 0, or a tree like z of such numbers, added to H's diagonal in the reference.
        method: "dense", "minres", "gmres", or "auto": dense up to 500 parameters, then MINRES, and
            GMRES for a condition.
        warm_start: the iteration starts from the tracked v instead of 0. It comes further in few
            iterations, but where `converged` is False the reference leans towards the tracked v,
            and the cosine is too kind.
        trainable: a pytree prefix of z with booleans; False for parameters that z's optimiser
            never moves: they are no variables of the reference's system. None: all.
        max_iterations: MINRES's at most.
        tolerance: the relative residual at which MINRES stops, and that `converged` asks for.

    Raises:
        ValueError: `method` is unknown, or MINRES for a condition; `damping` < 0; a side has no
            data, or minibatches of several sizes.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x * batch) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> x, ones = jnp.array(3.0), jnp.ones(2)
        >>> exact = bf.Variables(inner=x * ones, adjoint=1 - x * ones, outer=x)
        >>> check = bf.diagnostics.hypergradient_check(problem, exact, ones, ones)
        >>> check.method, round(check.cosine, 4), float(check.reference)
        ('dense', 1.0, 4.0)

    References:
        F. Pedregosa. Hyperparameter optimization with approximate gradient. ICML 2016.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    checks.check_count("max_iterations", max_iterations)
    for each in jax.tree.leaves(damping):
        checks.at_least("damping", np.min(each, initial=np.inf))
    nonsymmetric = is_condition(problem.inner_loss)
    if method == "minres" and nonsymmetric:
        raise ValueError('method="minres" needs a symmetric H, and a condition has none: "gmres"')
    point, model_state, rng = place(problem, point, model_state, rng)
    if isinstance(inner, Batch) and outer is None:
        inner, outer = inner.inner, inner.outer
    sides = (_stacked("inner", inner), _stacked("outer", outer))
    for name, tree in (("inner_params", point.inner), ("outer_params", point.outer)):
        checks.parameters(name, tree)
    first = jax.tree.map(lambda leaf: leaf[0], sides[0][0])
    context = {"model_state": model_state, "rng": rng}
    symmetry = check_symmetry(problem, point, first, **context)

    moving = moving_leaves(point.inner, trainable)
    vector = flat(point.adjoint, moving)
    by_leaf = not np.isscalar(damping) and jax.tree.leaves(damping)
    diagonal = jnp.asarray(flat(damping, moving) if by_leaf else damping)
    gradients = systems.outer_gradients(problem, point, sides[1], model_state, rng)
    held = (point, sides[0], gradients, model_state, rng, diagonal)
    if method == "dense" or (method == "auto" and vector.size <= _DENSE_BELOW):
        method, iterations = "dense", vector.size
        solve = systems.solve_nonsymmetric if nonsymmetric else systems.solve_symmetric
        solution, curvature = solve(*map(np.asarray, systems.dense_system(problem, moving, *held)))
    elif method == "gmres" or nonsymmetric:
        method, iterations, curvature = "gmres", max_iterations, np.zeros(0)
        solution = systems.gmres(problem, moving, max_iterations, *held, warm_start, tolerance)
    else:
        method = "minres"
        args = (problem, moving, max_iterations, *held, warm_start, tolerance)
        solution, lanczos = systems.minres(*args)
        curvature, iterations = krylov.ritz_values(lanczos), int(lanczos.iterations)
    solution = jnp.asarray(solution, vector.dtype)
    *numbers, ours, reference = _compared(problem, moving, *held, solution)
    cosine, error, ratio, residual, reference_residual = (float(number) for number in numbers)
    return HypergradientCheck(
        cosine=cosine,
        relative_error=error,
        norm_ratio=ratio,
        adjoint_residual=residual,
        reference_residual=reference_residual,
        # The recurrence's own residual and the true one part ways near the machine precision.
        converged=reference_residual <= max(2 * tolerance, 1e-12),
        smallest_curvature=float(curvature[0]) if len(curvature) else float("nan"),
        largest_curvature=float(curvature[-1]) if len(curvature) else float("nan"),
        iterations=iterations,
        method=method,
        symmetry=symmetry,
        direction=ours,
        reference=reference,
    )


def _stacked(name: str, side: Any) -> tuple[PyTree, jax.Array]:
    """Minibatches as leaves [k, ...], and their shares of the examples."""
    if side is None or (isinstance(side, list) and not side):
        raise ValueError(
            f"{name}={side!r} holds no data: pass a FiniteSum, a list of minibatches or one of them"
        )
    if isinstance(side, Batch):
        raise ValueError(
            f"{name} is a Batch: hand its two sides over by themselves, "
            "hypergradient_check(problem, point, batch.inner, batch.outer)"
        )
    if isinstance(side, FiniteSum):
        return side.batches, jnp.asarray(side.weights)
    minibatches = side if isinstance(side, list) else [side]
    masks = [example_mask(minibatch) for minibatch in minibatches]
    counts = np.array([1.0 if mask is None else float(jnp.sum(mask)) for mask in masks])
    shapes = {str(jax.tree.map(jnp.shape, minibatch)) for minibatch in minibatches}
    if len(shapes) > 1:
        raise ValueError(
            f"{name} holds minibatches of several shapes ({' and '.join(sorted(shapes)):.120}): "
            "bf.data.partition pads them and adds a mask"
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *minibatches)
    return stacked, jnp.asarray(counts / counts.sum())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compared(problem, moving, point, inner, gradients, model_state, rng, diagonal, solution):
    v, x = point.adjoint, point.outer
    grad_z, grad_x = gradients

    def at(adjoint):
        def products(batch, key):
            here = point._replace(adjoint=adjoint)
            _, _, hvp, cross = oracles.inner_products(problem, here, batch, model_state, key)
            return flat(hvp, moving), rows.densify(cross, x)

        hvp, cross = mean_over(products, inner, rng)
        return hvp, rows.add(cross, grad_x)

    # One after the other through the same code: half of it to compile.
    solved = unflat(solution, v, moving)
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), v, solved)
    hvps, directions = jax.lax.map(at, pair)
    ours, reference = (jax.tree.map(lambda leaf, i=i: leaf[i], directions) for i in (0, 1))
    grad = flat(grad_z, moving)
    inner_product = optax.tree.vdot(filter_inexact(ours), filter_inexact(reference))
    size, right = norm(ours), norm(reference)
    return (
        inner_product / (size * right),
        norm(jax.tree.map(jnp.subtract, filter_inexact(ours), filter_inexact(reference))) / right,
        size / right,
        ratio(norm(hvps[0] + grad), norm(grad)),
        ratio(norm(hvps[1] + diagonal * solution + grad), norm(grad)),
        ours,
        reference,
    )
