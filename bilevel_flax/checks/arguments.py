"""Checks of single arguments: a number, a key, an optimiser."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


class UserError(ValueError):
    """A mistake of whoever calls: one line that names the argument, the value and the fix.

    The command line prints it without a stack trace and ends with exit code 2.
    """


def key(name: str, value: Any) -> None:
    """Raises unless `value` is a PRNG key, or None.

    Raises:
        TypeError: a seed, or anything else.
    """
    dtype = getattr(value, "dtype", None)
    if value is None or (dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        return
    if dtype != np.uint32 or np.ndim(value) != 1:
        seed = value if isinstance(value, numbers.Integral) else 0
        raise TypeError(f"{name}={value!r:.40} is no key: pass {name}=jax.random.key({seed})")


def at_least(name: str, value: Any, least: float = 0.0) -> None:
    """Raises unless `value` is a number >= `least`.

    Raises:
        TypeError: no number.
        ValueError: below, or NaN.
    """
    is_scalar = hasattr(value, "dtype") and np.ndim(value) == 0
    if not (isinstance(value, numbers.Real) or is_scalar):
        raise TypeError(f"{name}={value!r:.40} must be a number >= {least:g}")
    if not float(value) >= least:
        raise ValueError(f"{name}={value} must be >= {least:g}")


def learning_rate(name: str, value: Any) -> None:
    """Raises unless `value` is a schedule or a number >= 0.

    Raises:
        TypeError: neither.
        ValueError: a negative number.
    """
    if not callable(value):
        at_least(name, value)


def optimizer(name: str, value: Any) -> optax.GradientTransformation:
    """`value`, if it is an Optax optimiser.

    Args:
        name: the argument's, for the error.
        value: what was passed.

    Raises:
        TypeError: an optimiser that was not called, a learning rate, a training state, or anything
            else without `init` and `update`.
    """
    if isinstance(value, optax.GradientTransformation):
        return value
    fix = f"pass {name}=optax.adam(1e-3), or another Optax optimiser"
    if isinstance(value, numbers.Real):
        fix = f"pass an optimiser with this step, {name}=optax.sgd({value!r})"
    elif isinstance(getattr(value, "tx", None), optax.GradientTransformation):
        fix = f"pass the optimiser in it, {name}=state.tx"
    elif callable(value):
        called = getattr(value, "__name__", type(value).__name__)
        fix = f"call it with its step, {name}={called}(1e-3); a schedule goes into an optimiser"
    elif callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return value
    raise TypeError(f"{name}={value!r:.60} is no optimiser: {fix}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises unless `value` is an integer >= `least`.

    Raises:
        UserError: names the argument and the value.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be an integer >= {least}, got {value!r}")


def as_count(name: str, value: Any, least: int = 1) -> int:
    """The value as a Python integer.

    Raises:
        ValueError: it is no integer >= `least`; names the argument and the value.
    """
    check_count(name, value, least)
    return int(value)


def check_positive(name: str, value: Any) -> None:
    """Raises unless `value` is a schedule or a positive finite number.

    Raises:
        UserError: names the argument and the value.
    """
    if callable(value):
        return
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise UserError(f"{name} must be a positive number or a schedule, got {value!r}")


def check_number(name: str, value: Any, above: float = -math.inf) -> None:
    """Raises unless `value` is a finite number above `above`.

    Raises:
        UserError: names the argument and the value.
    """
    fine = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not fine or not above < float(value) < math.inf:
        kind = {-math.inf: "a finite number", 0.0: "a positive number"}.get(above, f"> {above:g}")
        raise UserError(f"{name} must be {kind}, got {value!r}")


def check_partition(count_name: str, count: Any, weights_name: str, weights: Any) -> None:
    """Raises unless there is a positive number of minibatches and a weight for each.

    Raises:
        UserError: names the arguments and their values.
    """
    check_count(count_name, count)
    if weights is not None and np.shape(weights) != (count,):
        raise ValueError(
            f"{weights_name} has shape {np.shape(weights)}, but {count_name} is {count}: "
            "pass one share for each minibatch (FiniteSum.weights)"
        )
