"""Optimisers for penalties e^x: steps that no penalty can make diverge, and a box for x."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class CountState(NamedTuple):
    """Steps taken."""

    count: jax.Array  # int32 scalar


def penalty_aware_sgd(
    learning_rate: optax.ScalarOrSchedule, *, margin: float = 3.0
) -> optax.GradientTransformation:
    """SGD on z (or v) with the penalty's curvature e^x divided out.

        z_k -= g_k / (1/ρ + m e^{x_k})

    Where a penalty is small this is SGD with step ρ. Where it grows beyond 1/ρ, plain SGD has
    ρ e^x > 2 and diverges; here the step shrinks to 1/m of the penalty's own Newton step.

    Args:
        learning_rate: ρ, or a schedule of the step count.
        margin: m >= 1. SAGA is stable for steps up to 1/(3L): with m = 1 SABA diverges.

    Returns:
        A transformation that takes the extra argument `outer_params`, x, whose shape broadcasts
        against z's. The solvers hand it to the inner and the adjoint optimiser.

    Raises:
        ValueError: `margin` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> inner = penalty_aware_sgd(1.0)
        >>> z, x = jnp.ones(2), jnp.array([-20.0, 20.0])
        >>> step, _ = inner.update(jnp.exp(x) * z, inner.init(z), z, outer_params=x)
        >>> [round(float(value), 3) for value in step]
        [-0.0, -0.333]
    """
    if not margin >= 1:
        raise ValueError(f"margin={margin} must be at least 1")

    def init(params):
        del params
        return CountState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, outer_params=None, **extra_args: Any):
        del params, extra_args
        if outer_params is None:
            raise ValueError(
                "penalty_aware_sgd needs outer_params: use it as a solver's inner or adjoint "
                "optimiser, or pass update(..., outer_params=x)"
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(direction):
            penalty = jnp.broadcast_to(jnp.exp(outer_params), direction.shape)
            return (-direction / (1 / jnp.asarray(rate) + margin * penalty)).astype(direction.dtype)

        steps = jax.tree.map(step, updates)
        return steps, CountState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def boxed(
    transformation: optax.GradientTransformation, low: float, high: float
) -> optax.GradientTransformation:
    """A transformation whose steps end inside [low, high].

    Args:
        transformation: any Optax transformation.
        low: the least value of a parameter.
        high: the largest.

    Raises:
        ValueError: low is not below high.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> outer = boxed(optax.sgd(1.0), -1.0, 1.0)
        >>> x = jnp.zeros(2)
        >>> outer.update(jnp.array([5.0, -0.5]), outer.init(x), x)[0].tolist()
        [-1.0, 0.5]
    """
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")

    def update(updates, state, params=None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError("boxed needs params: update(directions, state, params)")
        clipped = jax.tree.map(
            lambda step, point: jnp.clip(point + step, low, high) - point, updates, params
        )
        return clipped, state

    box = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(transformation, box)


def decaying(peak: float, patience: float, exponent: float = 1.0) -> optax.Schedule:
    """The schedule peak / (1 + t / patience)^exponent: constant at first, no end to be known.

    Args:
        peak: the value at step 0.
        patience: steps after which it has fallen to peak / 2^exponent.
        exponent: of the decay; 0 keeps the peak.

    Raises:
        ValueError: `patience` is not positive.

    Example:
        >>> [float(decaying(1.0, 10)(t)) for t in (0, 10, 30)]
        [1.0, 0.5, 0.25]
    """
    if patience <= 0:
        raise ValueError(f"patience={patience} must be positive")
    return lambda step: peak / (1 + step / patience) ** exponent


def penalty_adam(
    learning_rate: float,
    patience: float,
    low: float = -25.0,
    high: float = 12.0,
    *,
    exponent: float = 2.0,
) -> optax.GradientTransformation:
    """Adam on x with the step γ / (1 + t / patience)^exponent, inside a box.

    e^{x_k} z_k v_k spans ten orders of magnitude, so x has to move by steps in units of x. Adam's
    steps do not shrink with the directions' noise, so the schedule decides how fast x settles:
    on ijcnn1 the error follows γ_t. In all x can travel γ patience / (exponent - 1).

    Args:
        learning_rate: γ, in units of x.
        patience: steps after which the step has fallen to γ / 2^exponent.
        low: the least x.
        high: the largest.
        exponent: of the decay. At most 1: x can travel any distance, and settles slowly.
    """
    # Far out a penalty's derivative is 1e-10 and less, and still has to count.
    adam = optax.adam(decaying(learning_rate, patience, exponent), b2=0.999, eps=1e-13)
    return boxed(adam, low, high)
