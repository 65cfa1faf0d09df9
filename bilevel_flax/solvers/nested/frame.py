"""The frame around the methods with their own loop.

Such a method is a function `step(sampled, state, inner, outer) -> (state, StepReport)`, of which
`nested` makes a `BilevelSolver`. The model state moves once in an update: it is that of the first
evaluation of G.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax import checks
from bilevel_flax import per_sample as rows
from bilevel_flax.base import (
    Aux,
    Batch,
    BilevelSolver,
    Finite,
    Info,
    Method,
    Metrics,
    Oracles,
    Problem,
    PyTree,
    TrainState,
    Variables,
)
from bilevel_flax.checks import require_ids
from bilevel_flax.minibatches import importance_factors
from bilevel_flax.oracles.evaluate import NOTHING, Evaluation, merge_aux, residual
from bilevel_flax.per_sample import RowTransformation
from bilevel_flax.solvers.constraints import without_held
from bilevel_flax.solvers.initial_state import init_state
from bilevel_flax.solvers.inner_optimiser import check_value, trainable
from bilevel_flax.solvers.nested.linear_solves import Hypergradient
from bilevel_flax.solvers.nested.sampled_oracles import (
    Minibatch,
    SampledOracles,
    axpy,
    first,
)
from bilevel_flax.solvers.optimiser_probes import coupled_decay
from bilevel_flax.solvers.step import (
    all_finite,
    make_info,
    move_outer,
    rollback_unless_finite,
    tolerant,
    updated,
)
from bilevel_flax.tree import norm, rows_at


class StepReport(NamedTuple):
    """What a step reports beside the new state.

    Attributes:
        inner: (G, aux) of the update's first evaluation.
        outer: (F, aux).
        inner_norms: ‖D_z‖, a scalar or one for each inner step.
        adjoint_norm: ‖Hv + ∇₁F‖ at the v that D_x was made with.
        residual: the same relative to ‖∇₁F‖.
        d_x: the direction of x.
        units: the update's cost where it is random; None: as configured.
        metrics: of the method's own, by name.
        inner_last: F came before G, so a model state that both update is G's.
    """

    inner: tuple[jax.Array, Aux]
    outer: tuple[jax.Array, Aux]
    inner_norms: jax.Array
    adjoint_norm: jax.Array
    residual: jax.Array
    d_x: PyTree
    units: jax.Array | None = None
    metrics: Metrics = {}
    inner_last: bool = False

    def evaluation(self, problem: Problem) -> Evaluation:
        """The same as an `Evaluation`, with the model state that the update leaves."""
        (inner_loss, inner_aux), (outer_loss, outer_aux) = self.inner, self.outer
        model_state, metrics = merge_aux(problem, inner_aux, outer_aux)
        if self.inner_last:
            model_state = inner_aux.model_state
        metrics = {**metrics, **self.metrics}
        return Evaluation(NOTHING, inner_loss, outer_loss, model_state, metrics, self.residual)


def report_at(inner, at: Hypergradient, inner_norms, d_x: PyTree = None, units=None) -> StepReport:
    """A StepReport from the Hv at the v that D_x was made with.

    Args:
        inner: (G, aux) of the update's first evaluation.
        at: the hypergradient.
        inner_norms: ‖D_z‖, a scalar or one for each inner step.
        d_x: the direction of x; None: the hypergradient's.
        units: as in `StepReport`.
    """
    adjoint_norm = norm(axpy(1.0, at.hvp, at.outer.inner))
    relative = residual(Oracles(None, at.hvp, None, at.outer.inner, None))
    d_x = at.d_x if d_x is None else d_x
    out = at.outer.out
    return StepReport(inner, out, inner_norms, adjoint_norm, relative, d_x, units, at.metrics)


def refresh_minibatch(
    problem: Problem, state: TrainState, batch: Batch, side: str, factors
) -> Minibatch:
    """The one minibatch of a full pass; its key is that of its id, the same in every pass."""
    data, ids = getattr(batch, side), getattr(batch, f"{side}_id")
    rng = _fixed_key(state, side, ids) if problem.stateful else None
    return Minibatch(data, None if factors is None else rows_at(factors, ids), rng)


def _fixed_key(state: TrainState, side: str, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(state.rng, 3 + (side == "outer")), position)


def _minibatches(
    side: str, batch: Batch, batches, factors, key: Callable | None, name: str
) -> Minibatch:
    """Those of an update; `key(side, position in the update, id)` gives each its rng key."""
    data, ids = getattr(batch, side), getattr(batch, f"{side}_id")
    count = batches[side == "outer"]
    if batches == (1, 1) or (count == 1 and ids is not None and jnp.ndim(ids) == 0):
        data, ids = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (data, ids))
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(data)]
    for path, leaf in leaves + ([] if ids is None else [("_id", ids)]):
        if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != count:
            raise ValueError(
                f"batch.{side}{path} has shape {jnp.shape(leaf)}, "
                f"but {name} takes batches={batches} minibatches an update: give every leaf and "
                f"the ids a leading axis of {count}"
            )
    keys = None
    if key is not None:
        positions = jnp.arange(count)
        keys = jax.vmap(functools.partial(key, side))(positions, positions if ids is None else ids)
    return Minibatch(data, None if factors is None else rows_at(factors, ids), keys)


def sampled_oracles(
    problem: Problem, transforms: Variables, state: TrainState, solves: bool = True
) -> SampledOracles:
    """The oracles of an update or a refresh, with what z's optimiser does to the system of v.

    Args:
        problem: the problem.
        transforms: the optimisers.
        state: before the update.
        solves: there is such a system.
    """
    of_inner = transforms.inner, state.inner_opt_state, *state.variables[::2]
    decay = coupled_decay(*of_inner) if solves else None
    return SampledOracles(problem, transforms, state.model_state, trainable(*of_inner), decay)


def nested(
    problem: Problem,
    step: Callable[..., tuple[TrainState, StepReport]],
    *,
    name: str,
    inner: optax.GradientTransformation | None,
    outer: optax.GradientTransformation,
    adjoint: optax.GradientTransformation | None = None,
    memory: Callable[[Variables], PyTree] = lambda variables: (),
    batches: tuple[int, int],
    units: float,
    inner_weights: Any = None,
    outer_weights: Any = None,
    moves_outer: bool = False,
    row_directions: bool = True,
    fixed_keys: bool = False,
    sees_outer: Callable[..., PyTree] = lambda *args: (),
    second_order: bool = True,
    solves: bool = True,
) -> BilevelSolver:
    """The frame around a method's step: Minibatches in, the move of x, Info and the freeze out.

    Args:
        problem: the bilevel problem.
        step: `step(sampled, state, inner, outer) -> (state, StepReport)` with a `SampledOracles`
            and Minibatches [K] and [L]; it moves z and v. x moves along `StepReport.d_x` after.
        name: the method's name, for logs and errors.
        inner: optimiser of z.
        outer: optimiser of x.
        adjoint: optimiser of v; None where v has no iteration of its own.
        memory: `memory(variables) -> estimator_state` at the start.
        batches: (K, L).
        units: gradient units of one update (expected, where they are random).
        inner_weights: float [N], each inner minibatch's share of the samples; None: equal.
        outer_weights: float [M], the same for the outer data.
        moves_outer: the step moves x itself.
        row_directions: `StepReport.d_x` keeps per-sample leaves as `Rows`.
        fixed_keys: a minibatch's rng key is that of its id, in `refresh_minibatch` as in an update
            (methods that compare visits).
        sees_outer: `sees_outer(sampled, state, inner, x) -> tree`, what D_x sees of x beside G.
        second_order: the step asks for products with second derivatives of G.
        solves: and solves a system in its Hessian (`unrolled` differentiates z's steps instead).

    Raises:
        ValueError: weights that are no shares, a row-sparse outer optimiser where D_x is dense;
            at trace time missing ids or leading axes.
    """
    checks.problem(problem)
    inner = checks.optimizer("inner", inner)
    for variable, value in (("outer", outer), ("adjoint", adjoint or inner)):
        checks.optimizer(variable, value)
    sparse_outer = isinstance(outer, RowTransformation)
    dense_direction = moves_outer or not row_directions
    if sparse_outer and dense_direction and rows.has_rows(problem.per_sample):
        raise ValueError(
            f"outer is a row-sparse optimiser, but {name}'s direction of x is dense: use a dense "
            "one, e.g. optax.adam"
        )
    transforms = Variables(*(tolerant(t) for t in (inner, adjoint or optax.identity(), outer)))
    factors = {
        "inner": importance_factors("inner_weights", inner_weights),
        "outer": importance_factors("outer_weights", outer_weights),
    }
    solves = solves and second_order
    by_id = fixed_keys and problem.stateful
    needed = {side: by_id or factor is not None for side, factor in factors.items()}

    def init(inner_params, outer_params, *, model_state=None, rng=None):
        return init_state(problem, memory, transforms, inner_params, outer_params, model_state, rng)

    def checked(state: TrainState, batch: Batch) -> list[Minibatch]:
        checks.batch(batch)
        require_ids(batch, name, needed)

        def key(side, position, minibatch):
            if fixed_keys:
                return _fixed_key(state, side, minibatch)
            of_side = jax.random.fold_in(state.rng, side == "outer")
            return jax.random.fold_in(jax.random.fold_in(of_side, state.step), position)

        keys = key if problem.stateful else None
        check_value(problem, transforms.inner, state.inner_opt_state, *state.variables[::2])
        return [_minibatches(side, batch, batches, factors[side], keys, name) for side in factors]

    def bound(state: TrainState, start: Minibatch) -> SampledOracles:
        sampled = sampled_oracles(problem, transforms, state, solves)
        if not solves:
            return sampled
        z, _, x = state.variables
        gradient = lambda: sampled.inner_grad(z, x, start)[1]
        of_inner = transforms.inner, state.inner_opt_state, z, x, gradient
        return dataclasses.replace(sampled, trainable=without_held(sampled.trainable, *of_inner))

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Info]:
        inner, outer = checked(state, batch)
        start = first(inner)
        sampled = bound(state, start)
        # Of what has come to rest v says nothing any more.
        state = state.replace(adjoint=sampled.constrain(state.adjoint))
        checks.losses(
            problem,
            state.variables,
            Batch(start.data, first(outer).data),
            state.model_state,
            start.rng,
            functools.partial(sees_outer, sampled, state, inner),
            second_order,
        )
        new, report = step(sampled, state, inner, outer)
        norms = Variables(jnp.atleast_1d(report.inner_norms), report.adjoint_norm, norm(report.d_x))
        finite = Finite(*(jnp.isfinite(value).all() for value in norms))
        d_x = report.d_x
        if not moves_outer:
            x, opt_state, d_x = move_outer(transforms.outer, d_x, all_finite(finite), state)
            new = new.replace(outer_params=x, outer_opt_state=opt_state)
        evaluation = report.evaluation(problem)
        if problem.stateful:
            new = new.replace(model_state=evaluation.model_state)
        norms = norms._replace(inner=norms.inner[-1])
        info = make_info(evaluation, norms, finite, units if report.units is None else report.units)
        moved = not moves_outer and not sparse_outer
        old = updated(new, state, (False, False, moved))
        return rollback_unless_finite(finite, new.replace(step=state.step + 1), old, d_x), info

    return BilevelSolver(init, update, method=Method(name, float(units), batches=batches))
