"""Is a loss a mean over its minibatch's examples? Its program says so, without being run.

Of a mean the parts' mean is the whole; of a sum, or of Σ losses / Σ mask over tokens, it is not.

* The loss is traced for a minibatch and for one of twice the examples. What is added up over a
  dimension that doubles doubles, and no longer once it is divided by what doubles as well: a number
  that differs between the two programs, or a count. Powers of the number of examples are followed
  from equation to equation; all terms of a mean have the power 0.
* A division by one number that depends on the examples and on no parameter shows a mean over what
  is counted in the minibatch.

Where a program is not understood (the two differ, a loop over examples, an unknown function of a
sum) nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from bilevel_flax.oracles.jaxprs import sub_jaxprs
from bilevel_flax.oracles.powers import (
    SAME_VALUES,
    SETTING,
    STEADY,
    Powers,
    alike,
    exponent,
    of_equation,
    of_ratio,
)

_ROUNDS = 4  # after which a loop's carry grows with each pass


class Growth(NamedTuple):
    """What a loss's program says.

    Attributes:
        power: p other than 0 where a term of the loss is, for twice the examples, 2^p times as
            large; 0: there is no such term, or it is not known.
        divides_by_data: whether it divides by one number that its examples alone decide on.
    """

    power: float
    divides_by_data: bool


class _Value(NamedTuple):
    powers: Powers
    of_data: bool = False
    of_params: bool = False
    one_number: bool = False  # all entries are the same


class _UnlikeError(Exception):
    """The two programs differ in more than shapes and numbers."""


def growth(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    twice: Sequence[Any],
    params: Any,
    is_data: Sequence[bool] | None = None,
) -> Growth:
    """How a loss depends on the number of examples, and on what is counted in them.

    Args:
        function: `function(arrays, params) -> scalar`.
        arrays: a minibatch; shapes are enough.
        twice: one of twice the examples, likewise.
        params: a pytree of arrays.
        is_data: which arrays are, and no masks; None: all.

    Example:
        >>> import jax.numpy as jnp
        >>> losses = lambda data, z: (data[0] - z) ** 2
        >>> data, twice = [jnp.ones((2, 3))], [jnp.ones((4, 3))]
        >>> growth(lambda d, z: losses(d, z).mean(), data, twice, 1.0).power
        0.0
        >>> growth(lambda d, z: losses(d, z).sum(), data, twice, 1.0).power
        1.0
        >>> growth(lambda d, z: losses(d, z).sum() / d[0].sum(), data, twice, 1.0)
        Growth(power=0.0, divides_by_data=True)
    """
    small = jax.make_jaxpr(function)(list(arrays), params)
    flags = [True] * len(arrays) if is_data is None else list(is_data)
    given = [_Value(STEADY, flag) for flag in flags]
    given += [_Value(STEADY, of_params=True)] * (len(small.in_avals) - len(flags))
    try:
        big = jax.make_jaxpr(function)(list(twice), params)
    except Exception:  # whatever it is: a loss may well be made for one size of the minibatch
        big = small
    walk = _Walk()
    try:
        (loss,) = walk.program(small, big, given)
    except _UnlikeError:
        walk = _Walk()
        (loss,) = walk.program(small, small, given)
    return Growth(max(loss.powers or STEADY, key=abs), walk.divides_by_data)


class _Walk:
    """Through two programs at once, equation by equation."""

    def __init__(self):
        self.divides_by_data = False

    def program(self, small: Any, big: Any, given: Sequence[_Value]) -> list[_Value]:
        """The values of a jaxpr's outputs, from those of its inputs."""
        consts = [_constant(a, b) for a, b in zip(_consts(small), _consts(big), strict=True)]
        small, big = (getattr(each, "jaxpr", each) for each in (small, big))
        known = dict.fromkeys(small.constvars, _Value(STEADY))
        known |= dict(zip(small.constvars, consts, strict=False))
        known |= dict(zip(small.invars, given, strict=True))

        def value(atom, twin):
            if isinstance(atom, core.Literal):
                return _constant(atom.val, getattr(twin, "val", None))
            single = atom.aval.size == twin.aval.size == 1
            return known[atom]._replace(one_number=known[atom].one_number or single)

        if [eqn.primitive for eqn in small.eqns] != [eqn.primitive for eqn in big.eqns]:
            raise _UnlikeError
        for eqn, twin in zip(small.eqns, big.eqns, strict=True):
            inputs = [value(*pair) for pair in zip(eqn.invars, twin.invars, strict=True)]
            known |= dict(zip(eqn.outvars, self._equation(eqn, twin, inputs), strict=True))
        return [value(*pair) for pair in zip(small.outvars, big.outvars, strict=True)]

    def _equation(self, eqn: Any, twin: Any, inputs: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        self._look_at_divisor(eqn, inputs)
        pairs = list(zip(sub_jaxprs(eqn), sub_jaxprs(twin), strict=True))
        if name == "scan":
            return self._scan(eqn, twin, inputs)
        if name == "while":
            return self._while(eqn, twin, inputs)
        if name == "cond":
            branches = [self.program(*pair, inputs[1:]) for pair in pairs]
            return [_joined(each) for each in zip(*branches, strict=True)]
        sizes = len(eqn.invars), len(eqn.outvars)
        if name != "pallas_call" and (same := [p for p in pairs if _sizes(p[0]) == sizes]):
            return self.program(*same[0], inputs)
        one = all(each.one_number for each in inputs) and bool(inputs)
        powers = of_equation(eqn, twin, [each.powers for each in inputs])
        out = _joined(inputs)._replace(one_number=one and name in SAME_VALUES, powers=powers)
        return [out] * len(eqn.outvars)

    def _look_at_divisor(self, eqn: Any, inputs: list[_Value]) -> None:
        by = inputs[1] if eqn.primitive.name == "div" else inputs[0] if exponent(eqn) < 0 else None
        if by and by.one_number and by.of_data and not by.of_params:
            self.divides_by_data = True

    def _scan(self, eqn: Any, twin: Any, inputs: list[_Value]) -> list[_Value]:
        body = eqn.params["jaxpr"], twin.params["jaxpr"]
        inside = getattr(body[0], "jaxpr", body[0])
        # By shapes, since JAX renames the parameters: what is cut into slices is longer.
        count = _whole(eqn.outvars, inside.outvars)
        first = _whole(eqn.invars, inside.invars) - count
        consts, carry, slices = inputs[:first], inputs[first:][:count], inputs[first + count :]
        # Over examples, and it may add them up.
        steady = eqn.params["length"] == twin.params["length"]
        carry, outs = self._loop(body, consts, carry, slices, _ROUNDS if steady else 0)
        return carry + outs[count:]

    def _while(self, eqn: Any, twin: Any, inputs: list[_Value]) -> list[_Value]:
        of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = inputs[of_cond:][:of_body], inputs[of_cond + of_body :]
        body = eqn.params["body_jaxpr"], twin.params["body_jaxpr"]
        return self._loop(body, consts, carry, [], 0)[0]  # who knows how often

    def _loop(
        self, body: tuple, consts: list, carry: list, slices: list, rounds: int
    ) -> tuple[list, list]:
        """The carry after any number of passes, and the outputs of the last one."""
        found = self.divides_by_data
        for left in reversed(range(rounds + 2)):
            if left <= 1:  # once more for the flags of what depends on it
                carry = [each._replace(powers=None) for each in carry]
            outs = self.program(body[0], body[1], [*consts, *carry, *slices])
            after = [_after(old, new) for old, new in zip(carry, outs, strict=False)]
            if after == carry:
                break
            carry = after
        self.divides_by_data = found  # what a carry depends on is known at the end alone
        return carry, outs


def _whole(atoms: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many of a scan's inputs or outputs its body has as they are."""
    return sum(a.aval.shape == b.aval.shape for a, b in zip(atoms, inside, strict=True))


def _sizes(program: Any) -> tuple[int, int]:
    program = getattr(program, "jaxpr", program)
    return len(program.invars), len(program.outvars)


def _consts(program: Any) -> Sequence[Any]:
    return getattr(program, "consts", ())


def _constant(small: Any, big: Any) -> _Value:
    """A number in the program: a setting, or what tells how many examples there are."""
    pair = (small, big)
    if any(number is None or isinstance(number, Tracer) for number in pair):
        return _Value(STEADY)
    if (
        not jnp.issubdtype(jnp.result_type(small), jnp.number)
        or not np.size(small) == np.size(big) == 1
    ):
        return _Value(STEADY)
    a, b = (float(np.real(np.asarray(number)).reshape(())) for number in pair)
    return _Value(SETTING if a == b or math.isnan(a) else of_ratio(a, b), one_number=True)


def _joined(values: Sequence[_Value]) -> _Value:
    flags = (any(value[i] for value in values) for i in (1, 2))
    return _Value(alike([value.powers for value in values]), *flags)


def _after(carry: _Value, out: _Value) -> _Value:
    """A loop's carry, of which it is not known how often the loop was passed."""
    grown = carry.powers is not None and out.powers is not None and carry.powers <= out.powers
    return _joined([carry, out])._replace(powers=out.powers if grown else None)
