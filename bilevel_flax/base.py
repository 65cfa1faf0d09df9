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

PyTree = Any
Metrics = Mapping[str, jax.Array]

# Sentinel of `BilevelSolver.next_refresh`: no refresh is ever due.
NEVER = int(jnp.iinfo(jnp.int32).max)

DERIVATIVES = ("forward_over_reverse", "reverse_over_reverse", "finite_differences")


COMPUTE_DTYPES = ("bfloat16", "float32", "float64")


def _check_compute_dtype(dtype: Any, derivatives: str) -> None:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype={dtype!r} is not among {COMPUTE_DTYPES} (float16 overflows without "
            "loss scaling); None computes in the parameters' own"
        )
    if name == "bfloat16" and derivatives == "finite_differences":
        raise ValueError(
            f'compute_dtype={dtype!r} has 8 bits, too few for derivatives="finite_differences": '
            "take another of the two"
        )


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
        remat: recompute the inner loss's forward pass in the backward one
            (`jax.checkpoint`): less memory, about 1.2 times the FLOPs.
        microbatches: k >= 1: the oracles are summed over k equal parts of every minibatch, one
            after the other, inside the step. The same numbers with the activations of one part;
            the leading lengths of the minibatches must be divisible by k. A stateful loss is
            called k times, each with a key of its own and the model state after the part before,
            so BatchNorm normalises by the statistics of a part.
        compute_dtype: "bfloat16": the losses are handed z and the minibatch's floats (but not
            `batch["mask"]`) rounded to it, inside the differentiated function; x stays as it is.
            z, v, all gradients and products and the optimisers keep their own dtypes (float32
            masters). Products are then within about 1 % of those in float32. Best with losses
            that go on from `logits.astype(jnp.float32)`. None: as the parameters are.
        linear: the parts of a model that is linear in its parameters; set by `linear_problem`.
        distributed: how the oracles are computed in shares of a minibatch and added up over
            devices; set by `sharding.data_parallel`. `distributed(problem, evaluate, points,
            batch, model_state, rngs, combine, exact, seed) -> (Evaluation, lengths)`; see there.

    Raises:
        ValueError: `derivatives` is not one of the three, `microbatches` no integer >= 1,
            `compute_dtype` not among those that there are, or too coarse for finite differences.
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
    remat: bool = False
    microbatches: int = 1
    compute_dtype: Any = None
    linear: Any = None
    distributed: Callable[..., Any] | None = None

    def __post_init__(self):
        for name in ("inner_loss", "outer_loss"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}")
        if self.derivatives not in DERIVATIVES:
            raise ValueError(
                f"derivatives={self.derivatives!r} is unknown; choose one of {DERIVATIVES}"
            )
        count = self.microbatches
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"microbatches={count!r} must be an integer >= 1")
        if self.compute_dtype is not None:
            _check_compute_dtype(self.compute_dtype, self.derivatives)


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


def _never(state: TrainState) -> jax.Array:
    del state
    return jnp.int32(NEVER)


def _no_refresh(state: TrainState, batch: Batch) -> TrainState:
    del batch
    return state


class Estimator(NamedTuple):
    """Turns oracle calls into directions; it takes the place of `jax.grad`.

    The `oracle` that it is handed is `oracle(variables) -> oracles.Evaluation`, on one minibatch.
    `oracle(variables, evaluate)` evaluates less of it (`oracles.evaluate_block` ...), and
    `oracle(variables, evaluate, combine)` fills in `Evaluation.directions` by the linear function
    `combine(oracles)`: all that an estimator without memory needs, and on many devices all that
    is then added up (the oracles themselves are None there). `oracle((one, other), evaluate,
    combine)` evaluates two points, `combine(oracles_at_one, oracles_at_other)`, and returns the
    rest of the evaluation at the first.
    Its quantities are scaled by N·w_i (w_i the minibatch's share of the samples), so that the
    objective is the plain average of N components and no estimator needs to know about ragged
    minibatches.

    Attributes:
        init: `init(variables) -> state`.
        update: `update(oracle, variables, batch, state) -> (directions, state, evaluation)`, with
            the evaluation at the current point.
        refresh: `refresh(oracle, variables, batch, state) -> state`: one minibatch of a full pass;
            `batch.inner` or `batch.outer` is None.
        next_refresh: `next_refresh(state) -> int32`, the step before which a full pass is due.
        refresh_cursor: `refresh_cursor(state) -> int32`, minibatches of the due pass that are
            done: first all inner ones in order of their ids, then all outer ones.
        less: updates that leave something out, for some of the steps. A direction that is None is
            none: the variable stands still bit for bit, the state of its optimiser included.
        stage: `stage(state) -> int32`, which of `(*less, update)` comes next.
        units: gradient units of one update; one for each gradient, HVP and cross-JVP.
        refresh_units: (inner, outer) units of one minibatch of a refresh.
        fixed_keys: the rng key of a stateful loss must be the same each time a minibatch is
            visited (methods that compare visits).
        needs_ids: whether `batch.inner_id` and `batch.outer_id` are read.
    """

    init: Callable[[Variables], PyTree]
    update: Callable[..., tuple[Variables, PyTree, Any]]
    refresh: Callable[..., PyTree] | None = None
    next_refresh: Callable[[PyTree], jax.Array] | None = None
    refresh_cursor: Callable[[PyTree], jax.Array] | None = None
    less: tuple[Callable[..., tuple[Variables, PyTree, Any]], ...] = ()
    stage: Callable[[PyTree], jax.Array] | None = None
    units: float = 4.0
    refresh_units: tuple[float, float] = (0.0, 0.0)
    fixed_keys: bool = False
    needs_ids: bool = False


class BilevelSolver(NamedTuple):
    """All that a training loop knows of a method; pure, jittable functions.

    Attributes:
        init: see `Init`; no two leaves of the state share a buffer, so it can be donated.
        update: `update(state, batch) -> (state, info)`.
        refresh: `refresh(state, batch) -> state`, one minibatch of a scheduled full pass. It moves
            no iterate.
        next_refresh: `next_refresh(state) -> int32`: a pass is due when it is <= `state.step`.
        refresh_cursor: `refresh_cursor(state) -> int32`, minibatches of the due pass done so far,
            the inner ones first. A method that walks over the data several times goes back to 0
            and stays due: ask again after every chunk.
        batches: (K, L), fresh inner and outer minibatches that one update takes.
        units: gradient units of one update, as configured.
        refresh_units: (inner, outer) gradient units of one minibatch of a refresh.
        name: the method's name, for logs.
    """

    init: Init
    update: Callable[[TrainState, Batch], tuple[TrainState, Info]]
    refresh: Callable[[TrainState, Batch], TrainState] = _no_refresh
    next_refresh: Callable[[TrainState], jax.Array] = _never
    refresh_cursor: Callable[[TrainState], jax.Array] = _never
    batches: tuple[int, int] = (1, 1)
    units: float = 4.0
    refresh_units: tuple[float, float] = (0.0, 0.0)
    name: str = ""
