"""The types and protocols of the library; no computation happens here.

A bilevel problem is

    min_x  h(x) = F(z*(x), x)      with      z*(x) = argmin_z G(z, x)

with z the inner parameters, x the outer parameters and v the adjoint, the solution of
∇²₁₁G v = -∇₁F. At one point (z, v, x) the three directions of a single-loop method are

    D_z = ∇₁G        D_v = ∇²₁₁G v + ∇₁F        D_x = ∇²₂₁G v + ∇₂F

and ∇h(x) = D_x at (z*(x), v*(x), x).

References:
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms. NeurIPS 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from bilevel_flax import deprecated
from bilevel_flax.condition import Condition, is_condition

PyTree = Any
Metrics = Mapping[str, jax.Array]

# Sentinel of `BilevelSolver.next_refresh`: no refresh is ever due.
NEVER = int(jnp.iinfo(jnp.int32).max)

DERIVATIVES = ("forward_over_reverse", "reverse_over_reverse", "finite_differences")


class Variables(NamedTuple):
    """A point (z, v, x); directions and updates are the same type, as in Optax.

    Attributes:
        inner: z, the network's parameters, any pytree.
        adjoint: v, with the tree, shapes and dtypes of `inner`.
        outer: x, the hyperparameters, any pytree.
    """

    inner: PyTree
    adjoint: PyTree
    outer: PyTree


class Batch(NamedTuple):
    """One minibatch of the inner and one of the outer data.

    Attributes:
        inner: the minibatch given to the inner loss, any pytree; None in an outer refresh.
        outer: the minibatch given to the outer loss, any pytree; None in an inner refresh.
        inner_id: int32 scalar, the minibatch's position in the partition of the inner data, or
            None where a solver needs none. With `BilevelSolver.batches = (K, L)` other than
            (1, 1), the leaves and ids carry a leading [K] and [L]; a side of one minibatch may
            come without its axis if its id does too.
        outer_id: the same for the outer data.
    """

    inner: PyTree = None
    outer: PyTree = None
    inner_id: jax.Array | None = None
    outer_id: jax.Array | None = None


class Oracles(NamedTuple):
    """The five quantities that every method is made of (and that SABA memorises).

    Attributes:
        inner_grad: ∇₁G(z, x), tree of z.
        hvp: ∇²₁₁G(z, x) v, tree of z.
        cross_jvp: ∇²₂₁G(z, x) v, tree of x; per-sample leaves are `Rows`.
        outer_grad_inner: ∇₁F(z, x), tree of z.
        outer_grad_outer: ∇₂F(z, x), tree of x; per-sample leaves are None (F never sees them).
    """

    inner_grad: PyTree
    hvp: PyTree
    cross_jvp: PyTree
    outer_grad_inner: PyTree
    outer_grad_outer: PyTree


class Rows(NamedTuple):
    """The rows of a per-sample leaf that one minibatch touches; all others are zero.

    Attributes:
        index: int32 [batch], the rows. An index of n (one past the end) stands for "no row".
        values: [batch, *leaf.shape[1:]], one value for each of them.
    """

    index: jax.Array
    values: jax.Array


class Aux(NamedTuple):
    """What a stateful loss returns beside its value.

    Attributes:
        model_state: the new mutable state (e.g. BatchNorm's running statistics).
        metrics: scalars to log, by name.
    """

    model_state: PyTree = None
    metrics: Metrics = {}


class Table(struct.PyTreeNode):
    """A large array that is updated by rows; never touched as a whole inside a step.

    Estimator memories and the moments of row-sparse optimisers are wrapped in it, so that
    whatever walks over the state (the freeze on NaN, sharding rules, size checks) can tell.
    """

    rows: PyTree  # leaves [num_rows, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A bilevel problem: two losses and what the library must know about them.

    Attributes:
        inner_loss: G, `loss(inner_params, outer_params, batch) -> scalar`, the mean over the
            minibatch. If `stateful`: `loss(inner_params, outer_params, batch, model_state, rng)
            -> (scalar, Aux)`.
        outer_loss: F, of the same form. The model state that a stateful F returns is dropped
            (write F in evaluation mode) unless `outer_updates_state` is set.
        stateful: the losses take and return mutable model state and take an rng key. One key
            and one state update serve the whole step.
        outer_updates_state: F's new model state is kept as well; F is then handed the state
            that G returned.
        per_sample: a pytree prefix of `outer_params` with booleans (as masks in Optax): the
            leaves [n, ...] with one row for each inner training example. The inner loss is
            handed their rows for the minibatch, `leaf[batch["index"]]`, and only these rows are
            differentiated; the outer loss must not use them. None: no such leaf.
        derivatives: "forward_over_reverse" (default: 3 gradient units for the three inner
            quantities), "reverse_over_reverse" for losses that forward mode cannot
            differentiate, or "finite_differences" (approximate; see `oracles`).
        evaluate: how a step's oracles are computed in shares of a minibatch and added up over
            devices; set by `sharding.data_parallel`. `evaluate(shared, points, combine) ->
            Evaluation` with `shared` an `oracles.Shared`; None: on global arrays.

    `Problem.from_condition` is for an inner problem that is given by its condition, not by a loss.
    What else a problem may be able to do is wrapped around it: `oracles.remat`,
    `oracles.microbatched`, `oracles.mixed_precision`, `sharding.data_parallel`.

    Raises:
        ValueError: `derivatives` is not one of the three.
        TypeError: a loss is not callable.

    Example:
        >>> import bilevel_flax as bf
        >>> problem = bf.Problem(
        ...     inner_loss=lambda z, x, batch: ((z - x - batch) ** 2).mean(),
        ...     outer_loss=lambda z, x, batch: ((z - batch) ** 2).mean(),
        ... )
    """

    inner_loss: Callable[..., Any]
    outer_loss: Callable[..., Any]
    _: dataclasses.KW_ONLY
    stateful: bool = False
    outer_updates_state: bool = False
    per_sample: PyTree = None
    derivatives: str = "forward_over_reverse"
    evaluate: Callable[..., Any] | None = None
    # Wrappers since 0.2: `deprecated` makes them of these.
    remat: dataclasses.InitVar[bool] = False
    microbatches: dataclasses.InitVar[int] = 1
    compute_dtype: dataclasses.InitVar[Any] = None

    def __post_init__(self, remat: bool, microbatches: int, compute_dtype: Any):
        for name in ("inner_loss", "outer_loss"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}")
        if self.derivatives not in DERIVATIVES:
            raise ValueError(
                f"derivatives={self.derivatives!r} is unknown; choose one of {DERIVATIVES}"
            )
        if is_condition(self.inner_loss) and self.derivatives != "reverse_over_reverse":
            raise ValueError(
                f"derivatives={self.derivatives!r} gives Jv, and a condition needs Jᵀv: leave "
                "derivatives out"
            )
        deprecated.wrap_old_settings(self, remat, microbatches, compute_dtype)

    @classmethod
    def from_condition(
        cls,
        condition: Callable[..., Any],
        outer_loss: Callable[..., Any],
        *,
        stateful: bool = False,
        outer_updates_state: bool = False,
        per_sample: PyTree = None,
    ) -> Problem:
        """A problem whose z*(x) is where a condition is 0: a fixed point, a game, a TD target.

        With c the condition and J = ∂c/∂z, not assumed to be symmetric,

            D_z = c        D_v = Jᵀv + ∇₁F        D_x = (∂c/∂x)ᵀv + ∇₂F

        all from one vjp of c. The iteration z -= ρ c converges for small ρ where the eigenvalues
        of J have positive real parts, and v's then does as well. c has no value to be lowered:
        `f2sa` and optimisers that ask for one (line searches) are refused, and
        `Info.inner_loss` is the residual ‖c‖ (in parts of a minibatch: their mean).

        Args:
            condition: `condition(inner_params, outer_params, batch) -> tree like inner_params`, the
                mean over the minibatch. If `stateful`: `condition(inner_params, outer_params,
                batch, model_state, rng) -> (tree, Aux)`.
            outer_loss: F, as in `Problem`.
            stateful: as in `Problem`, and so are the arguments that follow.
            outer_updates_state: whether F's new model state is kept.
            per_sample: the leaves of x with a row for each inner example.

        Raises:
            TypeError: `condition` is no function; at trace time its output differs from z.

        Example:
            >>> import jax, jax.numpy as jnp, optax, bilevel_flax as bf
            >>> problem = bf.Problem.from_condition(
            ...     lambda z, x, batch: z - jnp.tanh(batch @ z + x),  # z* = tanh(W z* + x)
            ...     lambda z, x, batch: 0.5 * ((z - 0.5) ** 2).sum(),
            ... )
            >>> solver = bf.soba(problem, inner=optax.sgd(0.5), outer=optax.sgd(0.3))
            >>> batch = bf.Batch(jnp.array([[0.0, 0.5], [-0.5, 0.0]]), jnp.zeros(2))
            >>> state = solver.init(jnp.zeros(2), jnp.zeros(2))
            >>> update = jax.jit(solver.update)
            >>> for _ in range(200):
            ...     state, info = update(state, batch)
            >>> [round(float(value), 2) for value in state.inner_params]
            [0.5, 0.5]
        """
        if not callable(condition):
            raise TypeError(f"condition must be a function, got {condition!r}")
        return cls(
            Condition(condition),
            outer_loss,
            stateful=stateful,
            outer_updates_state=outer_updates_state,
            per_sample=per_sample,
            derivatives="reverse_over_reverse",
        )


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


class Finite(Variables):
    """Bools for z, v and x; true where all of them are, as a whole and in every entry."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return all(bool(np.all(side)) for side in self)


class Info(NamedTuple):
    """Diagnostics of one update, apart from the state; all scalars.

    `info.ok` says whether all went well: three finite directions and two finite losses.

    Attributes:
        inner_loss: G on the minibatch, at the point before the update.
        outer_loss: F on the minibatch.
        norms: Variables of float32, the Euclidean norms of the three directions.
        finite: `Finite`, whether each direction is. Where one is not, the state did not move.
        adjoint_residual: ‖Hv + ∇₁F‖ / ‖∇₁F‖ on the minibatch; where `sharding.data_parallel`
            reduces directions alone, an estimate (docs/sharding.md).
        oracle_units: what the update cost; a gradient, an HVP and a cross-JVP count 1 each.
        metrics: the user's scalars, by name.
    """

    inner_loss: jax.Array
    outer_loss: jax.Array
    norms: Variables
    finite: Finite
    adjoint_residual: jax.Array
    oracle_units: jax.Array
    metrics: Metrics

    @property
    def ok(self) -> jax.Array:
        """Bool, whether the three directions and both losses are finite."""
        losses = jnp.isfinite(self.inner_loss) & jnp.isfinite(self.outer_loss)
        return self.finite.inner & self.finite.adjoint & self.finite.outer & losses


class Init(Protocol):
    """`solver.init(inner_params, outer_params, *, model_state=None, rng=None) -> TrainState`."""

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


class FullPass(NamedTuple):
    """The scheduled passes over all minibatches that a method with memory makes.

    Attributes:
        update: `update(oracle, variables, batch, state) -> state`: one minibatch of a pass;
            `batch.inner` or `batch.outer` is None.
        due: `due(state) -> int32`, the step before which a pass is due.
        cursor: `cursor(state) -> int32`, minibatches of the due pass that are done: first all
            inner ones in order of their ids, then all outer ones.
        units: (inner, outer) gradient units of one minibatch.
    """

    update: Callable[..., PyTree]
    due: Callable[[PyTree], jax.Array]
    cursor: Callable[[PyTree], jax.Array]
    units: tuple[float, float] = (3.0, 1.0)


class Estimate(NamedTuple):
    """What an estimator makes of a pair of minibatches.

    Attributes:
        directions: (D_z, D_v, D_x).
        state: the estimator's new state.
        evaluation: the `oracles.Evaluation` at the current point: losses, metrics, residual.
        norms: the directions' Euclidean norms, where they are known; None: not yet.
        active: for each variable whether it moves, a bool scalar; one that does not stands still
            bit for bit, the state of its optimiser included. None: it always moves.
    """

    directions: Variables
    state: PyTree
    evaluation: Any
    norms: Variables | None = None
    active: Variables = Variables(None, None, None)


class Estimator(NamedTuple):
    """Turns oracle calls into directions; it takes the place of `jax.grad`.

    Attributes:
        init: `init(variables) -> state`.
        update: `update(oracle, variables, batch, state) -> Estimate`. The `oracles.Oracle` that it
            is handed gives `oracle.directions(point)`, all that a method without memory needs;
            `oracle.difference(now, before)`; and `oracle.at(point)`, the five quantities apart.
        full_pass: for methods with memory; None: there are no full passes.
        units: gradient units of one update; one for each gradient, HVP and cross-JVP.
        fixed_keys: the rng key of a stateful loss must be the same each time a minibatch is
            visited (methods that compare visits).
        needs_ids: whether `batch.inner_id` and `batch.outer_id` are read.
    """

    init: Callable[[Variables], PyTree]
    update: Callable[..., Estimate]
    full_pass: FullPass | None = None
    units: float = 4.0
    fixed_keys: bool = False
    needs_ids: bool = False


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
