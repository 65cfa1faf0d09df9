"""What a user writes down: two losses, and what is known about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_flax import deprecated
from bilevel_flax.base.condition import Condition, is_condition
from bilevel_flax.base.variables import Metrics, PyTree

DERIVATIVES = ("forward_over_reverse", "reverse_over_reverse", "finite_differences")


def check_problem(value: Any) -> None:
    """Raises unless `value` is a `Problem`.

    Raises:
        TypeError: a loss, a tuple of two, or anything else.
    """
    if not isinstance(value, Problem):
        raise TypeError(
            f"problem={value!r:.60} is no bf.Problem: pass bf.Problem(inner_loss, outer_loss)"
        )


class Aux(NamedTuple):
    """What a stateful loss returns beside its value.

    Attributes:
        model_state: the new mutable state (e.g. BatchNorm's running statistics).
        metrics: scalars to log, by name.

    Example:
        >>> import bilevel_flax as bf
        >>> bf.Aux(model_state={"mean": 0.0}, metrics={"accuracy": 0.5}).metrics
        {'accuracy': 0.5}
    """

    model_state: PyTree = None
    metrics: Metrics = {}


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
                several = " (several goals: bf.outer.goals({...}))" if name == "outer_loss" else ""
                raise TypeError(
                    f"{name} must be a function, got {getattr(self, name)!r:.80}{several}"
                )
        if self.derivatives not in DERIVATIVES:
            raise ValueError(
                f"derivatives={self.derivatives!r} is unknown; choose one of {DERIVATIVES}"
            )
        if is_condition(self.inner_loss) and self.derivatives != "reverse_over_reverse":
            raise ValueError(
                f"derivatives={self.derivatives!r} gives Jv, and a condition needs Jᵀv: leave "
                "derivatives out"
            )
        for flag in jax.tree.leaves(self.per_sample):
            if not isinstance(flag, (bool, np.bool_)):
                raise TypeError(
                    f"per_sample={self.per_sample!r:.60} must be a tree of booleans, such as "
                    'per_sample=True or {"weights": True, "rest": False}'
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
