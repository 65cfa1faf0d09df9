"""What in a loss stops it from being differentiated twice, by name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from bilevel_flax.oracles.float_leaves import floats, of_floats
from bilevel_flax.oracles.jaxprs import primitives, sub_jaxprs

# What JAX leaves in a program for the forward derivative that it does not have.
_FORWARD_OF_CUSTOM_VJP = "custom_lin"
_OWN_PROGRAM = "pallas_call"  # its jaxpr is the kernel's, on references to memory
_CUSTOM = ("custom_vjp", "custom_jvp")


def stop(loss: Callable, z: list, x: list, mode: str) -> str:
    """The primitive or kernel that stops products with ∇²₁₁G and ∇²₂₁G.

    Args:
        loss: `loss(z, x) -> (scalar, aux)`, of lists of float arrays.
        z: where.
        x: where.
        mode: "forward_over_reverse" or "reverse_over_reverse".

    Returns:
        A name for an error; "" where nothing stops them.
    """

    def gradient(*leaves):
        return jax.grad(lambda z, x: loss(z, x)[0], (0, 1))(list(leaves), x)

    return _stop(gradient, z, mode)


def first_order_stop(loss: Callable, z: list, x: list) -> str:
    """The same for the loss's gradients in z and in x."""
    count = len(z)
    value = lambda *leaves: [loss(list(leaves[:count]), list(leaves[count:]))[0]]
    return first_stop(value, [*z, *x])


def first_stop(function: Callable[..., list], leaves: Sequence) -> str:
    """The same for the backprop of a function of flat arrays, whose integers are constants."""
    return _stop(function, leaves, "reverse_over_reverse")


def second_stop(function: Callable[..., list], leaves: Sequence) -> str:
    """The same for the tangents of that backprop, in its arguments and in its cotangents."""

    def backprop(*leaves):
        moving = of_floats(lambda *leaves: floats(function(*leaves)), leaves)
        outs, pull = jax.vjp(moving, *floats(leaves))
        return list(pull(outs))

    return _stop(backprop, leaves, "forward_over_reverse")


def _stop(function: Callable[..., list], leaves: Sequence, mode: str) -> str:
    if _traces(function, leaves, mode):
        return ""
    found = _first(jax.make_jaxpr(function)(*leaves).jaxpr, mode)
    return found or "an operation without a name"


def refusal(loss: Callable, z: list, x: list, mode: str) -> str:
    """The error's text where `mode` is stopped; "" where it is not. Arguments as of `stop`."""
    name, other = stop(loss, z, x, mode), "reverse_over_reverse"
    if not name:
        return ""
    lend = "lend the kernel a reference, bf.oracles.with_reference(kernel, reference)"
    if mode != other and not stop(loss, z, x, other):
        fix = f'set Problem(..., derivatives="{other}"), or {lend}'
    else:
        fix = f"{lend}; or take bf.first_order; bf.oracles.probe(problem, ...) tells what works"
    return f"inner_loss cannot be differentiated twice by {mode}, which is stopped by {name}: {fix}"


def first_refusal(name: str, loss: Callable, z: list, x: list) -> str:
    """The error's text where a loss called `name` has no gradient; "" where it has."""
    found = first_order_stop(loss, z, x)
    return found and (
        f"{name} cannot be differentiated even once: {found} stops it; give it a jax.custom_vjp, "
        "or write this part in ordinary JAX"
    )


@contextlib.contextmanager
def explained(name: str, loss: Callable, z: list, x: list, mode: str = "") -> Iterator[None]:
    """Names the loss and the kernel in the place of JAX's error, if it is about one.

    Under `jit` JAX may raise when it compiles, far from the loss: `checks.losses` finds it there.

    Args:
        name: "inner_loss" or "outer_loss".
        loss: as of `stop`.
        z: where.
        x: where.
        mode: of second derivatives; "": a gradient alone is taken.

    Raises:
        TypeError: names what stops the derivatives.
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        try:
            jax.make_jaxpr(loss)(z, x)
        except Exception:  # the loss itself raised it
            raise error from error.__cause__
        message = first_refusal(name, loss, z, x) or (mode and refusal(loss, z, x, mode))
        if message:
            raise TypeError(message) from error
        raise


def _traces(function: Callable[..., Any], arguments: Sequence, mode: str) -> bool:
    def product(*leaves):
        of = of_floats(lambda *leaves: floats(jax.tree.leaves(function(*leaves))), leaves)
        along = floats(leaves)
        if mode == "forward_over_reverse":
            return jax.jvp(of, along, along)[1]
        out, pull = jax.vjp(of, *along)
        return pull(out)

    try:
        traced = jax.make_jaxpr(product)(*arguments)
    except Exception:  # whatever it is: the equation that raises it is looked for below
        return False
    return _FORWARD_OF_CUSTOM_VJP not in primitives(traced)


def _first(jaxpr: Any, mode: str) -> str:
    """The name of the first equation that cannot be differentiated in its own right."""
    for eqn in jaxpr.eqns:
        variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
        alone = core.Jaxpr((), variables, eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
        if _traces(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ())), shapes, mode):
            continue
        name = eqn.primitive.name
        for called in () if name == _OWN_PROGRAM else sub_jaxprs(eqn):
            if inside := _first(getattr(called, "jaxpr", called), mode):
                # The rule is the kernel's own, and what it hides is told beside its name.
                return f"{_described(eqn)} ({inside})" if name.startswith(_CUSTOM) else inside
        return _described(eqn)
    return ""


def _described(eqn: Any) -> str:
    name = eqn.primitive.name
    known = [eqn.params.get("name"), getattr(eqn.params.get("name_and_src_info"), "name", None)]
    custom = name.startswith(_CUSTOM)
    for called in sub_jaxprs(eqn) if custom else ():
        known.append(getattr(called, "jaxpr", called).debug_info.func_name)
    label = next((str(label) for label in known if label), "")
    label = re.sub(r"\s.*", "", label)
    kind = f"jax.{name[:10]}" if custom else name
    return f"{kind} {label!r}" if label else f"the primitive {name}"
