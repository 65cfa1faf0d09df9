"""The keywords that the methods share: an optimiser and the minibatches' weights for each level."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import optax

Function = TypeVar("Function", bound=Callable[..., Any])


class Common(TypedDict, total=False):
    """What every method takes beside its own settings, by keyword.

    Attributes:
        inner: optimiser of z, fed D_z = ∇₁G; required. It is handed `value=`, `grad=`, `value_fn=`,
            `grad_fn=` and `outer_params=` if it takes them. Where an update takes several inner
            steps its schedules count those. None, for single-loop methods: a host moves z and hands
            it over, `solver.update(state, batch, inner_params=z)` and `solver.refresh` likewise; v
            and x alone move here, and `adjoint` is required.
        outer: optimiser of x, fed D_x; required. Per-sample leaves reach it as `Rows` if it is
            row-sparse (`outer.lazy_adam` ...), dense otherwise.
        inner_weights: float [N], each inner minibatch's share of the samples, summing to 1
            (`FiniteSum.weights`); None: equal. Needs `batch.inner_id`.
        outer_weights: float [M], the same for the outer data. Needs `batch.outer_id`.
    """

    inner: optax.GradientTransformation | None
    outer: optax.GradientTransformation
    inner_weights: Any
    outer_weights: Any


class CommonWithAdjoint(Common, total=False):
    """`Common` for methods in which v has an iteration of its own.

    Attributes:
        adjoint: optimiser of v, fed D_v = ∇²₁₁G v + ∇₁F; None: as `inner`, see
            `adjoint.like_inner_optimizer`. Where `inner` decays weights in front of its step (SGD
            with weight decay), this must do so to v, too. It is handed `inner_opt_state`,
            `inner_direction` (D_z) and `inner_params`, all of before the step, and
            `adjoint_residual`, so that damping can follow it (`adjoint.self_damped`).
    """

    adjoint: optax.GradientTransformation | None


def takes(keywords: type) -> Callable[[Function], Function]:
    """Shows the keywords of `Common` or its kin in the signature of a method that hands them on."""

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        handed_on = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                # A string, as all other annotations are: a ForwardRef is no type to read.
                annotation=getattr(annotation, "__forward_arg__", annotation),
                default=inspect.Parameter.empty if name in ("inner", "outer") else None,
            )
            for name in ("inner", "outer", "adjoint", "inner_weights", "outer_weights")
            if (annotation := keywords.__annotations__.get(name)) is not None
        ]
        function.__signature__ = signature.replace(parameters=[*own, *handed_on])  # type: ignore[attr-defined]
        return function

    return shown
