"""Kernels that cannot be differentiated twice: a reference implementation lends them its tangents.

A fused kernel (cuDNN's and Pallas's attention) has a value and, by a `custom_vjp`, a first
gradient, and nothing more. With the same function written in ordinary JAX beside it, gradients
are the kernel's, and the reference is run in the tangents alone (`kernel_rules`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.extend.core import jaxpr_as_fun

from bilevel_flax.base import PyTree
from bilevel_flax.oracles.jaxprs import coarsest, rewritten
from bilevel_flax.oracles.kernel_rules import Opaque, floats, kernel, of_floats, opaque_p
from bilevel_flax.tree import is_inexact


class WithReference:
    """What `with_reference` returns; called, it is the kernel.

    Attributes:
        fast: the kernel.
        reference: the same function, differentiable as often as one likes.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> tanh = bf.oracles.with_reference(jnp.tanh, lambda a: 1 - 2 / (1 + jnp.exp(2 * a)))
        >>> tanh.check(jnp.array(0.5))  # silent where the two agree
        >>> float(tanh(jnp.array(0.0)))
        0.0
    """

    def __init__(self, fast: Callable[..., PyTree], reference: Callable[..., PyTree]):
        self.fast, self.reference = fast, reference
        self._traced: dict[Any, _Traced] = {}
        self._checked: set[_Call] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> PyTree:
        """The kernel's value. The first call on numbers, with these settings, compares the two.

        Raises:
            ValueError: as `check`.
        """
        leaves, call = _arrays(args, kwargs)
        if call not in self._checked and not any(isinstance(a, core.Tracer) for a in leaves):
            self.check(*args, **kwargs)
        traced = self._trace(leaves, call)
        return jax.tree.unflatten(traced.tree, traced.kernel(*leaves))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compares values and gradients of kernel and reference on these arguments.

        Raises:
            ValueError: they differ by more than rounding; names the output or argument.
        """
        leaves, call = _arrays(args, kwargs)
        with core.ensure_compile_time_eval():
            traced = self._trace(leaves, call)
            fast = _values_and_grads(traced.fast, leaves)
            reference = _values_and_grads(traced.reference, leaves)
        names = [f"output {i}" for i in range(len(traced.kernel.shapes))]
        pairs = zip(call.names, leaves, strict=True)
        names += [f"the gradient in argument {name}" for name, leaf in pairs if is_inexact(leaf)]
        if found := disagreement(names, fast, reference, traced.eps):
            raise ValueError(
                f"with_reference: {_name(self.fast)} and its reference differ: {found}; give both "
                "the same scale, mask and layout"
            )
        self._checked.add(call)

    def _trace(self, leaves: list, call: _Call) -> _Traced:
        key = call, tuple(jax.typeof(leaf) for leaf in leaves)
        if key not in self._traced:
            name = _name(self.fast)
            fast_program, shapes, tree = _flat(self.fast, call, leaves, name)
            plain_program, given, _ = _flat(
                self.reference, call, leaves, f"the reference of {name}"
            )
            fast, plain = jaxpr_as_fun(fast_program), jaxpr_as_fun(plain_program)
            mine, theirs = ([s.shape for s in each] for each in (shapes, given))
            if mine != theirs:
                raise ValueError(
                    f"with_reference: {name} returns shapes {mine}, its reference {theirs}"
                )

            def reference(*leaves):
                return [o.astype(s.dtype) for o, s in zip(plain(*leaves), shapes, strict=True)]

            whole = kernel(fast, reference, tuple(shapes))
            eps = max(coarsest(program) for program in (fast_program, plain_program))
            self._traced[key] = _Traced(fast, reference, tree, whole, eps)
        return self._traced[key]


class _Traced(NamedTuple):
    """A kernel for arguments of certain shapes; `fast` and `reference` of a flat list of arrays."""

    fast: Callable[..., list]
    reference: Callable[..., list]
    tree: Any  # of the result
    kernel: Opaque
    eps: float  # the machine precision of the coarsest dtype that one of them computes in


def with_reference(fast: Callable[..., PyTree], reference: Callable[..., PyTree]) -> WithReference:
    """A kernel for values and first gradients, with a reference for what second order needs.

    Exact bilevel steps then run on kernels that cannot be differentiated twice: products with the
    Hessian are the reference's, exact up to the rounding in which the two differ.

    Args:
        fast: the kernel, differentiable once in reverse mode; arrays in, arrays out. Arguments that
            are no arrays (flags, numbers, None) are settings and are handed to both.
        reference: the same function in ordinary JAX. It decides the memory of a step; for attention
            take `chunked_attention`.

    Returns:
        A function like `fast`. `.check(*args)` compares the two on numbers, as the first call
        outside of `jit` and `probe` do.

    Raises:
        TypeError: one of the two is no function.
        ValueError: from a call, where the two differ in shape or by more than rounding, or one of
            them uses a traced array that is no argument (its derivative would be lost).

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> @jax.custom_vjp
        ... def kernel(a):
        ...     return jnp.sin(a)
        >>> def backward(a, c):  # nothing differentiates a callback
        ...     return (c * jax.pure_callback(jnp.cos, a, a),)
        >>> kernel.defvjp(lambda a: (kernel(a), a), backward)
        >>> sine = bf.oracles.with_reference(kernel, jnp.sin)
        >>> round(float(jax.jvp(jax.grad(sine), (1.0,), (1.0,))[1]), 4)  # -sin 1
        -0.8415
    """
    for name, value in (("fast", fast), ("reference", reference)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r:.60}")
    return WithReference(fast, reference)


def by_reference(closed: Any) -> Any:
    """A closed jaxpr in which every kernel is replaced by its reference."""

    def change(eqn):
        instead = eqn.params["function"].instead if eqn.primitive is opaque_p else None
        if instead is None:
            return eqn
        return eqn.replace(params={**eqn.params, "function": instead})

    return rewritten(closed, change)


def disagreement(names: Sequence[str], ours: list, theirs: list, eps: float) -> str:
    """Which arrays differ most, if by more than rounding; else "".

    Args:
        names: of the arrays.
        ours: groups of arrays, each measured by the norm of the whole group.
        theirs: the same from the reference.
        eps: the machine precision of the coarsest dtype.
    """
    # Matrix units round factors to eight or ten bits, so float32 is no 24 bits there.
    allowed, errors = min(4 * eps**0.5, 0.05), []
    for group, other in zip(ours, theirs, strict=True):
        wide = [[np.asarray(leaf, np.float64).ravel() for leaf in side] for side in (group, other)]
        size = np.linalg.norm(np.concatenate(wide[1]))
        gaps = [float(np.linalg.norm(a - b)) for a, b in zip(*wide, strict=True)]
        errors += [gap / size if size else gap for gap in gaps]
    worst = int(np.argmax([np.inf if np.isnan(error) else error for error in errors]))
    if errors[worst] <= allowed:
        return ""
    return f"{names[worst]} by {errors[worst]:.2g} of the norm (rounding: {allowed:.2g})"


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call without its arrays: the tree of the arguments, and the settings among them."""

    tree: Any
    settings: tuple  # (position in the tree, value)
    names: tuple[str, ...]  # of the arrays

    def run(self, function: Callable, leaves: Sequence) -> Any:
        arrays, settings = iter(leaves), dict(self.settings)
        positions = range(self.tree.num_leaves)
        flat = [settings[i] if i in settings else next(arrays) for i in positions]
        args, kwargs = jax.tree.unflatten(self.tree, flat)
        return function(*args, **kwargs)


def _arrays(args: tuple, kwargs: dict) -> tuple[list, _Call]:
    pairs, tree = jax.tree.flatten_with_path((args, kwargs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for _, leaf in pairs]
    arrays = [pair for pair, flag in zip(pairs, is_array, strict=True) if flag]
    settings = tuple((i, leaf) for i, (_, leaf) in enumerate(pairs) if not is_array[i])
    names = tuple(jax.tree_util.keystr(path[1:]) for path, _ in arrays)
    return [jnp.asarray(leaf) for _, leaf in arrays], _Call(tree, settings, names)


def _flat(function: Callable, call: _Call, leaves: list, name: str):
    """`function` of the arrays alone as a jaxpr, with its outputs' shapes and tree."""
    closed, shapes = jax.make_jaxpr(lambda *leaves: call.run(function, leaves), return_shape=True)(
        *leaves
    )
    for const in closed.consts:
        if isinstance(const, core.Tracer):
            raise ValueError(
                f"with_reference: {name} uses a traced array ({jax.typeof(const)}) that is no "
                "argument, whose derivative would be lost: pass it as one to both"
            )
    return closed, closed.out_avals, jax.tree.structure(shapes)


def _values_and_grads(function: Callable[..., list], leaves: list) -> list[list]:
    @jax.jit
    def run(*leaves):
        outs, pull = jax.vjp(of_floats(function, leaves), *floats(leaves))
        keys = jax.random.split(jax.random.key(0), len(outs))
        cotangents = [
            jax.random.normal(key, out.shape, out.dtype)
            for key, out in zip(keys, outs, strict=True)
        ]
        return [list(outs), list(pull(cotangents))]

    return run(*leaves)


def _name(function: Callable) -> str:
    while not hasattr(function, "__name__") and hasattr(function, "func"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
