"""What a training loop knows of a method: its state, its diagnostics, its functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from bilevel_flax.base.variables import Batch, Metrics, PyTree, Variables

# Sentinel of `BilevelSolver.next_refresh`: no refresh is ever due.
NEVER = int(jnp.iinfo(jnp.int32).max)


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint needs, in one pytree of arrays.

    Attributes:
        step: int32 scalar, the updates taken so far.
        inner_params: z.
        adjoint: v, with z's tree, shapes and dtypes.
        outer_params: x, any pytree.
        inner_opt_state: Optax state of the inner optimiser.
        adjoint_opt_state: Optax state of the adjoint's.
        outer_opt_state: Optax state of the outer one.
        estimator_state: the estimator's memory (tables, running means, previous point, cursor).
        model_state: mutable model state (BatchNorm), or None.
        rng: the run's key; every step folds its number (or its minibatch's id) into it.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.adam(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.array(0.5), jnp.array(2.0))
        >>> int(state.step), [float(value) for value in state.variables]
        (0, [0.5, 0.0, 2.0])
    """

    step: jax.Array
    inner_params: PyTree
    adjoint: PyTree
    outer_params: PyTree
    inner_opt_state: PyTree
    adjoint_opt_state: PyTree
    outer_opt_state: PyTree
    estimator_state: PyTree
    model_state: PyTree
    rng: jax.Array

    @property
    def variables(self) -> Variables:
        """The point (z, v, x)."""
        return Variables(self.inner_params, self.adjoint, self.outer_params)

    @property
    def params(self) -> PyTree:
        """Z under the name that it has in Flax's TrainState: code that evaluates stays as it is."""
        return self.inner_params


def complete_by_state(point: Any, model_state: PyTree, rng: Any) -> tuple[Any, PyTree, Any]:
    """`(variables, model_state, rng)`; of a state what is not given (None) beside it.

    Raises:
        TypeError: `point` is something else.
    """
    if isinstance(point, Variables):
        return point, model_state, rng
    if not hasattr(point, "variables"):  # of a host's state, too (bf.directions)
        raise TypeError(
            f"point is a {type(point).__name__}, but must be a TrainState (solver.init), or "
            "bf.Variables(inner_params, adjoint, outer_params)"
        )
    model_state = point.model_state if model_state is None else model_state
    return point.variables, model_state, point.rng if rng is None else rng


class Finite(Variables):
    """Bools for z, v and x; true where all of them are, as a whole and in every entry.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.array(0.0), jnp.array(1.0))
        >>> _, info = solver.update(state, bf.Batch(jnp.nan, 1.0))
        >>> bool(info.finite), bool(info.finite.inner)
        (False, False)
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return all(bool(np.all(side)) for side in self)


class Info(NamedTuple):
    """Diagnostics of one update, apart from the state; all scalars.

    `info.ok` says whether all went well: three finite directions and two finite losses.

    Attributes:
        inner_loss: G on the minibatch, at the point before the update.
        outer_loss: F on the minibatch; None: not evaluated (plain training).
        norms: Variables of float32, the Euclidean norms of the three directions.
        finite: `Finite`, whether each direction is. Where one is not, the state did not move.
        adjoint_residual: ‖Hv + ∇₁F‖ / ‖∇₁F‖ on the minibatch; where `sharding.data_parallel`
            reduces directions alone, an estimate (docs/sharding.md).
        oracle_units: what the update cost; a gradient, an HVP and a cross-JVP count 1 each.
        metrics: the user's scalars, by name.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.array(0.0), jnp.array(3.0))
        >>> _, info = solver.update(state, bf.Batch(1.0, 1.0))
        >>> float(info.inner_loss), float(info.norms.inner), bool(info.ok)
        (9.0, 6.0, True)
    """

    inner_loss: jax.Array
    outer_loss: jax.Array | None
    norms: Variables
    finite: Finite
    adjoint_residual: jax.Array
    oracle_units: jax.Array
    metrics: Metrics

    @property
    def ok(self) -> jax.Array:
        """Bool, whether the three directions and both losses are finite."""
        losses = jnp.isfinite(self.inner_loss)
        if self.outer_loss is not None:
            losses &= jnp.isfinite(self.outer_loss)
        return self.finite.inner & self.finite.adjoint & self.finite.outer & losses


class Init(Protocol):
    """`solver.init(inner_params, outer_params, *, model_state=None, rng=None) -> TrainState`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.array(0.0), jnp.array(1.0))  # `solver.init` is one
        >>> float(state.outer_params)
        1.0
    """

    def __call__(
        self,
        inner_params: PyTree,
        outer_params: PyTree,
        *,
        model_state: PyTree = None,
        rng: jax.Array | None = None,
    ) -> TrainState:
        """Makes a fresh state; `rng` None: a fixed key."""
        ...


def _never(state: TrainState) -> jax.Array:
    del state
    return jnp.int32(NEVER)


def _no_refresh(state: TrainState, batch: Batch) -> TrainState:
    del batch
    return state


class Method(NamedTuple):
    """What is known about a solver before it runs.

    Attributes:
        name: the method's, for logs and errors.
        units: gradient units of one update, as configured.
        refresh_units: (inner, outer) gradient units of one minibatch of a refresh.
        batches: (K, L), fresh inner and outer minibatches that one update takes.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> bf.stocbio(
        ...     problem,
        ...     inner=optax.sgd(0.1),
        ...     outer=optax.sgd(0.1),
        ...     inner_steps=10,
        ...     adjoint_steps=5,
        ...     adjoint_step=0.1,
        ... ).method.batches  # minibatches of G and of F that an update takes
        (16, 1)
    """

    name: str = ""
    units: float = 4.0
    refresh_units: tuple[float, float] = (0.0, 0.0)
    batches: tuple[int, int] = (1, 1)


class BilevelSolver(NamedTuple):
    """All that a training loop knows of a method; pure, jittable functions.

    Attributes:
        init: see `Init`; no two leaves of the state share a buffer, so it can be donated.
        update: `update(state, batch) -> (state, info)`; single-loop methods made with `inner=None`
            take a host's z each time, `update(state, batch, inner_params=z)`, `refresh` too.
        refresh: `refresh(state, batch) -> state`, one minibatch of a scheduled full pass. It moves
            no iterate.
        next_refresh: `next_refresh(state) -> int32`: a pass is due when it is <= `state.step`.
        refresh_cursor: `refresh_cursor(state) -> int32`, minibatches of the due pass done so far,
            the inner ones first. A method that walks over the data several times goes back to 0
            and stays due: ask again after every chunk.
        method: name, costs and how many minibatches an update takes.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = solver.init(jnp.array(0.0), jnp.array(0.0))
        >>> state, info = solver.update(state, bf.Batch(1.0, 1.0))
        >>> solver.method.name, solver.method.units, int(state.step)
        ('soba', 4.0, 1)
    """

    init: Init
    update: Callable[..., tuple[TrainState, Info]]
    refresh: Callable[..., TrainState] = _no_refresh
    next_refresh: Callable[[TrainState], jax.Array] = _never
    refresh_cursor: Callable[[TrainState], jax.Array] = _never
    method: Method = Method()

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def units(self) -> float:
        """Gradient units of one update."""
        return self.method.units

    @property
    def refresh_units(self) -> tuple[float, float]:
        """(inner, outer) gradient units of one minibatch of a refresh."""
        return self.method.refresh_units

    @property
    def batches(self) -> tuple[int, int]:
        """(K, L), fresh inner and outer minibatches that one update takes."""
        return self.method.batches
