"""A solver in the place of an Optax optimiser.

Trainers keep `(params, opt_state)` and know how to save, shard and donate it. A solver's state
without z is such an `opt_state`: v, x, the estimator's memory, all moments, the key.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import Batch, BilevelSolver, Info, PyTree, TrainState
from bilevel_flax.tree import is_inexact


class SolverState(NamedTuple):
    """A `TrainState` without z and the model's state, which the trainer keeps; fields as there.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> from bilevel_flax.trainers import solver_optimizer
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> opt_state = solver_optimizer(solver, jnp.array(2.0)).init(jnp.array(0.0))
        >>> float(opt_state.outer_params), float(opt_state.adjoint)
        (2.0, 0.0)
    """

    step: jax.Array
    inner_opt_state: PyTree
    adjoint_opt_state: PyTree
    outer_opt_state: PyTree
    estimator_state: PyTree
    adjoint: PyTree
    outer_params: PyTree
    rng: jax.Array


class SolverOptimizer(optax.GradientTransformationExtraArgs):
    """What `solver_optimizer` returns: `init`, `update`, and the `solver`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> from bilevel_flax.trainers import solver_optimizer
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> tx = solver_optimizer(solver, jnp.array(2.0))
        >>> tx.solver is solver
        True
    """

    solver: BilevelSolver


def solver_optimizer(
    solver: BilevelSolver, outer_params: PyTree, *, rng: jax.Array | None = None
) -> SolverOptimizer:
    """A bilevel solver that a trainer takes for its optimiser.

    `init(params) -> opt_state` is a `SolverState`; x is `opt_state.outer_params`. A step is taken
    by `train_step`, or, where a trainer hands extra arguments on, by
    `update(grads, opt_state, params, batch=bf.Batch(...))`, which does not look at `grads` and
    returns the difference that z makes.

    Args:
        solver: any solver.
        outer_params: x to start from.
        rng: key of the run; None: a fixed one.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> from bilevel_flax.trainers import solver_optimizer
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: 0.5 * ((z - x) ** 2).sum(),
        ...     outer_loss=lambda z, x, batch: 0.5 * ((z - batch) ** 2).sum(),
        ... )
        >>> solver = bf.soba(problem, inner=optax.sgd(0.5), outer=optax.sgd(0.1))
        >>> tx = solver_optimizer(solver, jnp.ones(3))
        >>> z = jnp.zeros(3)
        >>> opt_state, update = tx.init(z), jax.jit(tx.update)
        >>> for _ in range(100):
        ...     batch = bf.Batch(jnp.ones(3), jnp.full(3, 5.0))
        ...     updates, opt_state = update(z, opt_state, z, batch=batch)
        ...     z = optax.apply_updates(z, updates)
        >>> [round(float(value), 2) for value in opt_state.outer_params]
        [5.0, 5.0, 5.0]
    """

    def init(params):
        state = solver.init(_plain(params), outer_params, rng=rng)
        return _like(params, _held(state))

    def update(updates, state, params=None, *, batch=None, model_state=None, **extra_args):
        del updates, extra_args
        if params is None or batch is None:
            raise TypeError(
                "a solver in the place of an optimiser needs params and batch=bf.Batch(training, "
                "validation): take the step by bilevel_flax.trainers.train_step, or hand batch= on "
                "to update"
            )
        moved, state, _, _ = train_step(solver, params, state, batch, model_state)
        change = lambda new, old: new - old if is_inexact(old) else jnp.zeros_like(old)
        return jax.tree.map(change, moved, params), state

    optimizer = SolverOptimizer(init, update)
    optimizer.solver = solver
    return optimizer


def train_step(
    solver: BilevelSolver,
    params: PyTree,
    opt_state: SolverState,
    batch: Batch,
    model_state: PyTree = None,
) -> tuple[PyTree, SolverState, PyTree, Info]:
    """One step of the solver on what a trainer keeps.

    Args:
        solver: as given to `solver_optimizer`.
        params: z, a pytree of arrays or an `nnx.State`.
        opt_state: from `init`, or from the step before.
        batch: one training and one validation minibatch.
        model_state: mutable state of a stateful problem, which the trainer keeps; None: there is
            none.

    Returns:
        `(params, opt_state, model_state, info)`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> from bilevel_flax.trainers import solver_optimizer, train_step
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> z = jnp.array(0.0)
        >>> opt_state = solver_optimizer(solver, jnp.array(2.0)).init(z)
        >>> z, opt_state, _, info = train_step(solver, z, opt_state, bf.Batch(1.0, 1.0))
        >>> round(float(z), 3)
        0.4
    """
    context = {} if model_state is None else model_state
    held = _plain(opt_state)._asdict()
    state = TrainState(inner_params=_plain(params), model_state=context, **held)
    new, info = solver.update(state, batch)
    after = None if model_state is None else new.model_state
    return _like(params, new.inner_params), _like(params, _held(new)), after, info


def _held(state: TrainState) -> SolverState:
    return SolverState(*(getattr(state, name) for name in SolverState._fields))


def _nnx() -> Any:
    """`flax.nnx` where somebody uses it: it takes a tenth of a second to import."""
    return sys.modules.get("flax.nnx")


def _is_state(node: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(node, nnx.State)


def _plain(tree: PyTree) -> PyTree:
    """The tree with plain dicts for `nnx.State`s, which solvers do not take."""
    if _nnx() is None:
        return tree
    from bilevel_flax.nnx.modules import plain, value_of

    leaf = lambda node: plain(node) if _is_state(node) else value_of(node)
    return jax.tree.map(leaf, tree, is_leaf=lambda node: _is_state(node) or _is_variable(node))


def _is_variable(node: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(node, nnx.Variable)


def _like(params: PyTree, tree: PyTree) -> PyTree:
    """The tree with an `nnx.State` where it has z's: v and moments carry z's sharding along."""
    if not _is_state(params):
        return tree
    from bilevel_flax.nnx.modules import filled, plain

    structure = jax.tree.structure(plain(params))
    is_z = lambda node: isinstance(node, dict) and jax.tree.structure(node) == structure
    return jax.tree.map(
        lambda node: filled(params, node) if is_z(node) else node, tree, is_leaf=is_z
    )
