"""Floating-point operations of a traced function, loops multiplied by their lengths.

XLA's own count (`cost_analysis`) has the body of a loop once, whatever its trip count. Here matrix
products and convolutions count two for each multiply-add, arithmetic one for each element.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from bilevel_flax.oracles.jaxprs import sub_jaxprs

_ARITHMETIC = {
    *("add", "add_any", "sub", "mul", "div", "neg", "max", "min", "sign", "abs", "floor", "square"),
    *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sqrt", "rsqrt", "pow"),
    *("integer_pow", "sin", "cos", "erf", "erf_inv", "erfc", "clamp", "rem", "atan2"),
}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "argmax"}


def of(jaxpr: Any) -> float:
    """Operations of one run, on all devices together.

    A loop whose length the program decides counts once; of a conditional's branches the dearest.

    Args:
        jaxpr: `jax.jit(f).trace(...).jaxpr`, or `jax.make_jaxpr(f)(...)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layers = jnp.zeros((5, 8, 8))
        >>> apply = lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0]
        >>> of(jax.make_jaxpr(apply)(jnp.zeros((4, 8))))
        2560.0
    """
    return float(sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if not eqn.outvars:
        return 0.0
    out = eqn.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2.0 * out.size * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out.size * math.prod(kernel) / features
    if name == "scan":
        return params["length"] * of(params["jaxpr"])
    if name == "cond":
        return max(of(branch) for branch in params["branches"])
    if name == "shard_map":  # written for one device
        return params["mesh"].size * of(params["jaxpr"])
    inside = [of(each) for each in sub_jaxprs(eqn)]
    if inside and name not in _REDUCTIONS:
        return sum(inside)
    if name in _ARITHMETIC and jax.numpy.issubdtype(out.dtype, jax.numpy.inexact):
        return float(out.size)
    if name in _REDUCTIONS:
        return float(eqn.invars[0].aval.size)
    return 0.0
