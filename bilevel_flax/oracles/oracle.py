"""What an estimator is handed: the oracles on one pair of minibatches, at any point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Batch, Oracles, Problem, PyTree, Rows, TrainState, Variables
from bilevel_flax.oracles.evaluate import Evaluation, evaluate_all, residual, through_inner
from bilevel_flax.oracles.gradients import inner_value_and_grad
from bilevel_flax.oracles.importance import importance_weighted
from bilevel_flax.oracles.residual_codes import evaluate_linear
from bilevel_flax.tree import (
    add,
    filter_inexact,
    is_inexact,
    masked,
    norm,
    plus_decay,
    rows_at,
    wide,
)


def directions(oracles: Oracles) -> Variables:
    """(D_z, D_v, D_x) from the five quantities; None where one of its terms was left out.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> oracles = bf.oracles.evaluate(problem, point, bf.Batch(1.0, 1.0))
        >>> [float(d) for d in bf.oracles.directions(oracles)]
        [-3.0, 2.0, -1.0]
    """
    z, hvp, cross, outer_inner, outer_outer = oracles
    v = None if hvp is None else add(hvp, outer_inner)
    return Variables(z, v, None if cross is None else rows.add(cross, outer_outer))


def difference(now: Variables, before: Variables, keep: Any, lazy: bool) -> Variables:
    """D(now) - keep · D(before); `Rows` too, unless `lazy`: these stay those of `now`.

    `keep` None: D(now) alone, so that nothing of `before` is computed. An array: in float32 at
    least.
    """
    if keep is None:
        return now

    def leaf(node, other):
        if rows.is_rows(node):
            return node if lazy else Rows(node.index, leaf(node.values, other.values))
        if not is_inexact(node):
            return node
        if isinstance(keep, float):
            return node - jnp.asarray(keep, node.dtype) * other
        # A share of what is left, (1 - keep) of it, has few digits in bfloat16 or none.
        dtype = wide(node.dtype)
        return node.astype(dtype) - jnp.asarray(keep, dtype) * other.astype(dtype)

    return jax.tree.map(leaf, now, before, is_leaf=rows.is_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """The oracles on one pair of minibatches, scaled by N·w_i.

    So the objective is the plain average of N components, and no estimator needs to know of
    minibatches of unequal sizes.

    Attributes:
        problem: the problem, its losses times N·w_i.
        batch: the pair of minibatches.
        model_state: mutable state of a stateful problem.
        rngs: the keys of (G, F).
        factors: (N·w_i, M·w_j), or None for equal minibatches.
        trainable: a tree of z's with False for leaves that z's optimiser never moves; they are no
            part of the linear system that v solves. None: all of them move.
        decay: λ for each float leaf of z where z's optimiser adds λz to its gradient; here in the
            residual alone, which is that of (H + λI)v = -∇₁F. None: it adds nothing.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> point = bf.Variables(jnp.array(0.0), jnp.array(1.0), jnp.array(3.0))
        >>> oracle = bf.oracles.Oracle(problem, bf.Batch(1.0, 1.0), None, (None, None))
        >>> [float(d) for d in oracle.directions(point).directions]
        [-3.0, 2.0, -1.0]
    """

    problem: Problem
    batch: Batch
    model_state: PyTree
    rngs: tuple[Any, Any]
    factors: tuple[Any, Any] = (None, None)
    trainable: PyTree = None
    decay: PyTree = None

    def at(self, point: Variables, evaluate: Callable[..., Evaluation] = evaluate_all):
        """The `Evaluation` at a point, with its `oracles`.

        Args:
            point: (z, v, x).
            evaluate: which of the quantities, e.g. `oracles.evaluate_inner`.
        """
        if self.problem.evaluate is None or evaluate is evaluate_linear:
            return self._finish(evaluate(self.problem, point, *self._context), point)
        return self._finish(self.problem.evaluate(self._shared(evaluate), (point,), None), point)

    def directions(self, point: Variables, evaluate: Callable[..., Evaluation] = evaluate_all):
        """The `Evaluation` at a point, with its `directions` (on many devices, these alone)."""
        if self.problem.evaluate is None:
            evaluation = self._finish(evaluate(self.problem, point, *self._context), point)
            return evaluation._replace(directions=directions(evaluation.oracles))
        evaluation = self.problem.evaluate(self._shared(evaluate), (point,), self._combine)
        return self._finish(evaluation, point)

    def difference(
        self, now: Variables, before: Variables, keep: Any = 1.0, lazy: bool = False
    ) -> Evaluation:
        """The `Evaluation` at `now` with D(now) - keep · D(before) for its `directions`.

        Args:
            now: a point.
            before: another one.
            keep: scalar; or three of them, for (D_z, D_v, D_x), None for D(now) alone.
            lazy: `Rows` of x stay those at `now`.
        """
        keeps = keep if isinstance(keep, Variables) else Variables(keep, keep, keep)

        def combine(*oracles: Oracles) -> Variables:
            both = [self._combine(part) for part in oracles]
            parts = zip(*both, keeps, strict=True)
            return Variables(*(difference(new, old, k, lazy) for new, old, k in parts))

        if self.problem.evaluate is None:
            first, second = (evaluate_all(self.problem, p, *self._context) for p in (now, before))
            both = combine(first.oracles, second.oracles)
            return self._finish(first, now)._replace(directions=both)
        evaluation = self.problem.evaluate(self._shared(evaluate_all), (now, before), combine)
        return self._finish(evaluation, now)

    def inner_value_and_grad(self, z: PyTree, x: PyTree) -> tuple[jax.Array, PyTree]:
        """`(G, ∇₁G)` on the inner minibatch, for optimisers that look around (line searches)."""
        (loss, _), grad = inner_value_and_grad(
            self.problem, z, x, self.batch.inner, self.model_state, self.rngs[0]
        )
        return loss, filter_inexact(grad)

    @property
    def _context(self) -> tuple:
        return self.batch, self.model_state, self.rngs

    def _shared(self, evaluate: Callable[..., Evaluation]) -> Shared:
        def movable(*args):
            evaluation = evaluate(*args)
            return evaluation._replace(oracles=self._movable(evaluation.oracles))

        chosen = evaluate if self.trainable is None else movable
        return Shared(self.problem, chosen, *self._context, decay=self.decay)

    def _combine(self, oracles: Oracles) -> Variables:
        return directions(self._movable(oracles))

    def _movable(self, oracles: Oracles) -> Oracles:
        """Without the entries of D_v that belong to parameters which never move."""

        def only(tree):
            return None if tree is None else masked(tree, self.trainable)

        return oracles._replace(
            hvp=only(oracles.hvp), outer_grad_inner=only(oracles.outer_grad_inner)
        )

    def _finish(self, evaluation: Evaluation, point: Variables) -> Evaluation:
        """With the losses as the user wrote them, and the residual."""
        oracles = self._movable(evaluation.oracles)
        by_inner, by_outer = self.factors
        relative, product = evaluation.residual, evaluation.product
        if product is None and oracles.hvp is not None:
            product = norm(oracles.hvp)
        if relative is None and oracles.hvp is not None and oracles.outer_grad_inner is not None:
            product_of_system = plus_decay(oracles.hvp, self.decay, point.adjoint)
            relative = residual(oracles._replace(hvp=product_of_system))
        share = evaluation.through_inner
        if share is None and self.batch.outer is not None and oracles.cross_jvp is not None:
            share = through_inner(oracles)
        return evaluation._replace(
            oracles=oracles,
            inner_loss=_unscaled(evaluation.inner_loss, by_inner),
            outer_loss=_unscaled(evaluation.outer_loss, by_outer),
            residual=relative,
            product=product,
            through_inner=share,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What `Problem.evaluate` is asked to do in shares of the minibatch; fields as `Oracle`'s.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: 0.5 * (z - x * b) ** 2, lambda z, x, b: z * b)
        >>> def on_global_arrays(shared, points, combine):  # a `Problem.evaluate` that cuts nothing
        ...     context = shared.batch, shared.model_state, shared.rngs
        ...     each = [shared.evaluate(shared.problem, point, *context) for point in points]
        ...     return each[0]._replace(directions=combine and combine(*(e.oracles for e in each)))
        >>> problem = bf.Problem(problem.inner_loss, problem.outer_loss, evaluate=on_global_arrays)
    """

    problem: Problem
    evaluate: Callable[..., Evaluation]
    batch: Batch
    model_state: PyTree
    rngs: tuple[Any, Any]
    decay: PyTree = None


def bind(
    problem: Problem,
    state: TrainState,
    batch: Batch,
    *,
    factors: tuple[Any, Any] = (None, None),
    fixed_keys: bool = False,
    trainable: PyTree = None,
    decay: PyTree = None,
) -> Oracle:
    """The oracle of one step.

    Args:
        problem: the problem.
        state: gives the model state, and the key that every step folds its number into.
        batch: the pair of minibatches; one side may be None.
        factors: ([N], [M]) of `importance_factors`, or None for equal minibatches.
        fixed_keys: a minibatch's id takes the place of the step in its key, so that a minibatch
            is the same at every visit.
        trainable: as in `Oracle`.
        decay: likewise.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> state = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1)).init(
        ...     jnp.array(0.0), jnp.array(3.0)
        ... )
        >>> oracle = bf.oracles.bind(problem, state, bf.Batch(1.0, 1.0))
        >>> float(oracle.at(state.variables).inner_loss)
        9.0
    """

    def key(side: int, seed: Any) -> Any:
        if not problem.stateful or seed is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(state.rng, side), seed)

    def factor(table: Any, data: PyTree, position: Any) -> Any:
        return None if table is None or data is None else rows_at(table, position)

    seeds = (batch.inner_id, batch.outer_id) if fixed_keys else (state.step, state.step)
    rngs = key(0, seeds[0]), key(1, seeds[1])
    inner = factor(factors[0], batch.inner, batch.inner_id)
    outer = factor(factors[1], batch.outer, batch.outer_id)
    weighted = importance_weighted(problem, inner, "inner_loss")
    weighted = importance_weighted(weighted, outer, "outer_loss")
    return Oracle(weighted, batch, state.model_state, rngs, (inner, outer), trainable, decay)


def _unscaled(loss: Any, factor: Any) -> Any:
    return loss if loss is None or factor is None else loss / factor
