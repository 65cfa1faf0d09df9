"""Powers of the number of examples in the terms of a value, from a traced program's equations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

Powers = frozenset[float] | None  # None: not known
STEADY = frozenset({0.0})
SETTING: frozenset[float] = frozenset()  # of a number in the program
# These leave all entries as they are.
SAME_VALUES = frozenset(("broadcast_in_dim", "reshape", "convert_element_type", "squeeze", "copy"))
# What of scaled inputs is scaled as they are; of some, the number of operands that it holds for.
_SCALED: dict[str, int | None] = dict.fromkeys(
    ("abs", "add", "add_any", "clamp", "concatenate", "expand_dims", "max", "min", "neg", "pad")
    + ("optimization_barrier", "real", "imag", "reduce_max", "reduce_min", "reduce_precision")
    + ("reduce_sum", "rev", "sharding_constraint", "slice", "sort", "stop_gradient", "sub")
    + ("transpose", *SAME_VALUES)
)
_SCALED |= {"dynamic_slice": 1, "gather": 1, "dynamic_update_slice": 2}
_SUMS = ("add", "sub", "add_any", "reduce_sum")  # terms of different powers remain terms
# They take examples' values out, and add up none.
_PICK = ("argmax", "argmin", "dynamic_slice", "gather", "reduce_and", "reduce_max", "reduce_min")
_PICK += ("reduce_or", "slice", "sort", "squeeze")
_ROOTS = {"sqrt": 0.5, "rsqrt": -0.5, "cbrt": 1 / 3, "square": 2.0}


def of_equation(eqn: Any, twin: Any, inputs: list[Powers]) -> Powers:
    """The powers of an equation's outputs.

    Args:
        eqn: the equation, which calls no program.
        twin: the same for twice the examples.
        inputs: the powers of its inputs.
    """
    name = eqn.primitive.name
    varies = any(map(_varies, eqn.invars, twin.invars))
    if all(getattr(out.aval, "dtype", None) == np.bool_ for out in eqn.outvars):
        return STEADY
    if name == "select_n":
        inputs = inputs[1:]
    elif name in _SCALED:
        inputs = inputs[: _SCALED[name]]
    if any(powers is None for powers in inputs):
        return None
    if name == "mul" and any(isinstance(v, core.Literal) and not np.any(v.val) for v in eqn.invars):
        return SETTING  # 0 times whatever
    if name in ("mul", "dot_general", "conv_general_dilated"):
        return _plus(_product(*inputs), _added_up(eqn, twin))
    if name == "div":
        return _product(inputs[0], _times(inputs[1], -1.0))
    if name in _ROOTS or exponent(eqn) != 1:
        return _times(inputs[0], _ROOTS.get(name) or exponent(eqn))
    if name == "scatter-add":
        added = varies and not any(map(_varies, eqn.outvars, twin.outvars))
        return _union([inputs[0], _plus(inputs[2], float(added))])
    terms = _union(inputs) if name in _SUMS else alike(inputs)
    if name in _SCALED or name == "select_n":
        return _plus(terms, _added_up(eqn, twin)) if name == "reduce_sum" else terms
    if terms is None or not terms <= STEADY:
        return None  # a function of a sum
    lost = varies and not any(map(_varies, eqn.outvars, twin.outvars))
    running = varies and name.startswith(("cum", "fft"))
    return None if running or (lost and name not in _PICK) else terms


def _added_up(eqn: Any, twin: Any) -> float:
    """The power of the number of terms that an equation adds up."""
    axes = eqn.params.get("axes", ())
    if "dimension_numbers" in eqn.params and eqn.primitive.name == "dot_general":
        axes = eqn.params["dimension_numbers"][0][0]
    shapes = [each.invars[0].aval.shape for each in (eqn, twin)] if axes else []
    counts = [math.prod(shape[axis] for axis in axes) for shape in shapes]
    return math.log2(counts[1] / counts[0]) if counts and counts[0] else 0.0


def exponent(eqn: Any) -> float:
    """Of a power; 1 for all other equations, and where it is not known."""
    if eqn.primitive.name == "integer_pow":
        return eqn.params["y"]
    by = eqn.invars[1] if eqn.primitive.name == "pow" else None
    return float(by.val) if isinstance(by, core.Literal) else 1.0


def _varies(atom: Any, twin: Any) -> bool:
    return atom.aval.shape != twin.aval.shape


def of_ratio(small: float, big: float) -> Powers:
    """Log2 of a ratio, where it is a half of an integer."""
    if not (small * big > 0 and math.isfinite(small * big)):
        return None
    power = round(2 * math.log2(big / small)) / 2
    return frozenset({power}) if math.isclose(big / small, 2**power, rel_tol=1e-3) else None


def _union(several: Sequence[Powers]) -> Powers:
    known = [powers for powers in several if powers is not None]
    return frozenset().union(*known) if len(known) == len(several) else None


def alike(several: Sequence[Powers]) -> Powers:
    """Those that all have, settings apart; of different ones it is not known which it will be."""
    union = _union(several)
    return union if union is None or all(not p or p == union for p in several) else None


def _product(first: Powers, second: Powers) -> Powers:
    if first is None or second is None:
        return None
    if not (first and second):
        return first or second
    return frozenset(a + b for a, b in itertools.product(first, second))


def _plus(powers: Powers, more: float) -> Powers:
    return powers if powers is None or not more else frozenset(p + more for p in powers or STEADY)


def _times(powers: Powers, factor: float) -> Powers:
    """Of a value to a power; of one with several terms only where the factor is 1."""
    if powers is None or factor == 1 or powers <= STEADY:
        return powers
    return frozenset(p * factor for p in powers) if len(powers) == 1 else None
