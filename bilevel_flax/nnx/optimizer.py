"""A bilevel solver in the place of `nnx.Optimizer`."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from bilevel_flax.base import Batch, BilevelSolver, Info, PyTree, TrainState
from bilevel_flax.nnx.modules import is_module, map_modules, plain, template_of, value_of
from bilevel_flax.nnx.state import init, params, write


class OptimizerArray(nnx.Variable):
    """An array of the solver's state inside an `Optimizer`.

    Example:
        >>> from flax import nnx
        >>> import bilevel_flax as bf
        >>> issubclass(bf.nnx.OptimizerArray, nnx.Variable)  # a filter for nnx.state
        True
    """


class OuterParam(nnx.Variable):
    """An array of x inside an `Optimizer`.

    Example:
        >>> from flax import nnx
        >>> import bilevel_flax as bf
        >>> issubclass(bf.nnx.OuterParam, nnx.Variable)  # a filter for nnx.state
        True
    """


class Optimizer(nnx.Pytree):
    """A bilevel solver in the place of `nnx.Optimizer`.

    Hand it to `nnx.jit` together with the module, as an `nnx.Optimizer`:
    `info = optimizer.update(model, bf.Batch(train_batch, validation_batch))`. The module is changed
    in place, and so are modules in `outer`. z lives in the module, everything else here;
    `nnx.jit(..., donate_argnums=...)` saves the second copy.

    Args:
        model: the module to train.
        solver: any solver of a `problem`, e.g. `bf.auto(problem, inner=optax.adamw(1e-3), ...)`.
        outer: x, as given to `problem`.
        wrt: as given to `problem`.
        rng: key of the run; None: a fixed one.

    Raises:
        TypeError: `model` is no `nnx.Module`, `solver` no solver.
        ValueError: there is nothing to learn in `model`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> from flax import nnx
        >>> def inner_loss(model, x, batch):
        ...     return jnp.mean(model(batch) ** 2) + jnp.exp(x) * jnp.sum(model.kernel[...] ** 2)
        >>> def outer_loss(model, x, batch):
        ...     return jnp.mean((model(batch) - 1) ** 2)
        >>> model, x = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.array(-2.0)
        >>> problem = bf.nnx.problem(inner_loss, outer_loss, model, x)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> optimizer = bf.nnx.Optimizer(model, solver, x)
        >>> update = nnx.jit(lambda model, optimizer, batch: optimizer.update(model, batch))
        >>> info = update(model, optimizer, bf.Batch(jnp.ones((4, 2)), jnp.ones((4, 2))))
        >>> bool(info.ok), optimizer.outer.shape
        (True, ())
    """

    def __init__(
        self,
        model: nnx.Module,
        solver: BilevelSolver,
        outer: PyTree,
        *,
        wrt: Any = nnx.Param,
        rng: jax.Array | None = None,
    ):
        if not isinstance(solver, BilevelSolver):
            raise TypeError(
                f"solver must be a BilevelSolver, got {type(solver).__name__}: Optimizer(model, "
                "bf.auto(bf.nnx.problem(...), inner=optax.adamw(1e-3), steps=...), outer)"
            )
        state = init(solver, model, outer, wrt=wrt, rng=rng)
        self.solver = solver
        self.wrt = wrt
        # Dropout alone needs no variables, but a key: then the model state is an empty dict.
        self._stateful = state.model_state is not None
        self._rest = nnx.data(jax.tree.map(OptimizerArray, _without_variables(state)))
        # Modules keep their own variables, so that nnx.jit updates the user's own modules.
        self._outer = nnx.data(
            map_modules(
                lambda node, _: node, lambda _, leaf: OuterParam(leaf), outer, state.outer_params
            )
        )

    @property
    def outer(self) -> PyTree:
        """x: arrays, and the modules that were handed in."""
        return jax.tree.map(value_of, self._outer, is_leaf=_is_module_or_variable)

    @property
    def step(self) -> jax.Array:
        """int32 scalar, the updates taken so far."""
        return self._rest.step.get_value()

    def update(self, model: nnx.Module, batch: Batch) -> Info:
        """One step of the solver, written into `model` and into the modules of `outer`.

        Args:
            model: the module, as given to the constructor or of the same structure.
            batch: one training and one validation minibatch (as many as `solver.batches`).

        Raises:
            TypeError: `batch` is no `Batch`.
            ValueError: whatever the solver refuses.
        """
        if not isinstance(batch, Batch):
            raise TypeError(
                f"batch must be bf.Batch(train_batch, validation_batch), got {type(batch).__name__}"
            )
        state, info = self.solver.update(self.state(model), batch)
        self.restore(model, state)
        return info

    @property
    def due(self) -> int | None:
        """The minibatch that a method with full passes (SRBA) must see before the next update.

        Minibatches of a pass are counted from 0, those of the inner data before those of the outer
        data; None: none is due. Read it outside of `nnx.jit`.
        """
        if int(self.solver.next_refresh(self._memory())) > int(self.step):
            return None
        return int(self.solver.refresh_cursor(self._memory()))

    def refresh(self, model: nnx.Module, batch: Batch) -> None:
        """Takes one minibatch of a full pass into the method's memory; `model` stays as it is.

        Args:
            model: as for `update`.
            batch: the minibatch that `due` names: `bf.Batch(inner=batch, inner_id=due)`, or, with m
                inner minibatches, `bf.Batch(outer=batch, outer_id=due - m)`.

        Example:
            >>> import bilevel_flax as bf, jax.numpy as jnp, optax
            >>> def loss(model, x, batch):
            ...     return x * jnp.mean(model(batch) ** 2)
            >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
            >>> solver = bf.srba(
            ...     bf.nnx.problem(loss, loss, model, jnp.ones(())),
            ...     inner=optax.sgd(0.1),
            ...     outer=optax.sgd(0.1),
            ...     num_inner_batches=2,
            ...     num_outer_batches=1,
            ...     period=10,
            ... )
            >>> optimizer = bf.nnx.Optimizer(model, solver, jnp.ones(()))
            >>> inner, outer = jnp.ones((2, 4, 2)), jnp.ones((1, 4, 2))  # 2 and 1 minibatches of 4
            >>> while (due := optimizer.due) is not None:
            ...     if due < 2:
            ...         batch = bf.Batch(inner=inner[due], inner_id=due)
            ...     else:
            ...         batch = bf.Batch(outer=outer[due - 2], outer_id=due - 2)
            ...     optimizer.refresh(model, batch)
            >>> _ = optimizer.update(model, bf.Batch(inner[0], outer[0], 0, 0))
        """
        state = self.solver.refresh(self.state(model), batch)
        jax.tree.map(_assign, self._rest, _without_variables(state), is_leaf=_is_variable)

    def _memory(self) -> TrainState:
        return jax.tree.map(value_of, self._rest, is_leaf=_is_variable)

    def state(self, model: nnx.Module) -> TrainState:
        """Everything that a checkpoint needs, as one pytree of arrays."""
        return self._memory().replace(
            inner_params=params(model, wrt=self.wrt),
            outer_params=params(self.outer),
            model_state=plain(template_of(model, self.wrt).rest) if self._stateful else None,
        )

    def restore(self, model: nnx.Module, state: TrainState) -> None:
        """Takes up a state (from a checkpoint), in place; the opposite of `state`."""
        write(state, model, self.outer, wrt=self.wrt)
        jax.tree.map(_assign, self._rest, _without_variables(state), is_leaf=_is_variable)
        _map_modules_and_variables(self._outer, state.outer_params)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_module_or_variable(node: Any) -> bool:
    return is_module(node) or _is_variable(node)


def _assign(variable: nnx.Variable, value: jax.Array) -> None:
    variable.set_value(value)


def _map_modules_and_variables(outer: PyTree, values: PyTree) -> None:
    def assign(node, value):
        if _is_variable(node):
            node.set_value(value)

    jax.tree.map(assign, outer, values, is_leaf=_is_module_or_variable)


def _without_variables(state: TrainState) -> TrainState:
    """The part of the state that is neither in the module nor in x."""
    return state.replace(inner_params=None, outer_params=None, model_state=None)
