"""Does a loss divide by what it counts in its minibatch? Then it is no mean over the examples.

Σ losses / Σ mask over tokens, class weights that are made to sum to 1: of such a loss the mean over
parts of a minibatch is not that of the minibatch. It shows in the loss's program as a division by
one number that depends on the examples and on no parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from bilevel_flax.oracles.jaxprs import sub_jaxprs

_SAME_VALUES = ("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "copy")
_LOOPS = ("scan", "while", "cond")  # what they carry is not followed


class _Value(NamedTuple):
    of_data: bool
    of_params: bool
    one_number: bool  # all entries are the same


def divides_by_data(function: Callable[..., Any], data: Sequence[Any], params: Any) -> bool:
    """Whether `function(data, params)` divides by one number that `data` alone decides on.

    Args:
        function: a loss.
        data: arrays.
        params: a pytree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> losses = lambda data, z: (data[0] - z) ** 2 * data[1]
        >>> data = [jnp.ones((2, 3)), jnp.ones((2, 3))]
        >>> divides_by_data(lambda d, z: losses(d, z).mean(), data, 1.0)
        False
        >>> divides_by_data(lambda d, z: losses(d, z).sum() / d[1].sum(), data, 1.0)
        True
    """
    closed = jax.make_jaxpr(function)(list(data), params)
    is_data = [at < len(data) for at in range(len(closed.jaxpr.invars))]
    values = [_Value(flag, not flag, False) for flag in is_data]
    return _walk(closed.jaxpr, values)[0]


def _walk(jaxpr: Any, given: Sequence[_Value]) -> tuple[bool, list[_Value]]:
    """Whether there is such a division, and what the outputs are."""
    known = dict.fromkeys(jaxpr.constvars, _Value(False, False, False))
    known |= dict(zip(jaxpr.invars, given, strict=True))

    def value(atom):
        if isinstance(atom, core.Literal):
            return _Value(False, False, True)
        return known[atom]._replace(one_number=known[atom].one_number or atom.aval.size == 1)

    found = False
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [value(atom) for atom in eqn.invars]
        power = eqn.params.get("y", 1) if name == "integer_pow" else 1
        if name == "pow":
            power = getattr(eqn.invars[1], "val", 1)
        divisor = inputs[1] if name == "div" else inputs[0] if power < 0 else None
        if divisor and divisor.one_number and divisor.of_data and not divisor.of_params:
            return True, []
        called = [getattr(sub, "jaxpr", sub) for sub in sub_jaxprs(eqn)]
        same = [sub for sub in called if len(sub.invars) == len(inputs)]
        if same and name not in _LOOPS:
            found, outputs = _walk(same[0], inputs)
            if found:
                return True, []
        else:
            one = all(each.one_number for each in inputs) and bool(inputs)
            of_data, of_params = (any(each[i] for each in inputs) for i in range(2))
            outputs = [_Value(of_data, of_params, one and name in _SAME_VALUES)] * len(eqn.outvars)
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return found, [value(atom) for atom in jaxpr.outvars]
