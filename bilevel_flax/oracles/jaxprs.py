"""Traced programs: rewritten equation by equation, and searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def rewritten(closed: Any, change: Callable[[Any], Any]) -> Any:
    """A closed jaxpr with `change(equation)` in the place of every equation, those in loops too.

    Args:
        closed: the jaxpr.
        change: of an equation that calls no other ones.
    """

    def rewrite(value):
        if isinstance(value, core.Jaxpr):  # since jax 0.12 a closed one is one of these, too
            return value.replace(eqns=[equation(eqn) for eqn in value.eqns])
        if isinstance(value, core.ClosedJaxpr):
            return core.ClosedJaxpr(rewrite(value.jaxpr), value.consts)
        if type(value) in (tuple, list):
            return type(value)(rewrite(item) for item in value)
        return value

    def equation(eqn):
        eqn = change(eqn)
        return eqn.replace(params={name: rewrite(value) for name, value in eqn.params.items()})

    return rewrite(closed)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, each before those that it calls."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for called in sub_jaxprs(eqn):
            yield from equations(called)


def sub_jaxprs(eqn: Any) -> list:
    """The jaxprs that an equation calls."""
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [value for value in values if _is_jaxpr(value)]


def float_dtypes(jaxpr: Any) -> set:
    """The floating-point types that a jaxpr computes in, complex ones and kernels' too."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    variables = [*inner.invars, *(var for eqn in equations(inner) for var in eqn.outvars)]
    dtypes = {getattr(var.aval, "dtype", jnp.int32) for var in variables}
    for eqn in equations(inner):  # `kernel_rules.Opaque` says what it hides
        dtypes |= getattr(eqn.params.get("function"), "computes_in", frozenset())
    return {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)}


def coarsest(jaxpr: Any) -> float:
    """The largest machine precision of what a jaxpr computes in; 0 where it has no floats."""
    return max((float(jnp.finfo(dtype).eps) for dtype in float_dtypes(jaxpr)), default=0.0)


def primitives(jaxpr: Any) -> set[str]:
    """The names of the primitives in a jaxpr and in those that it calls."""
    return {eqn.primitive.name for eqn in equations(jaxpr)}


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
