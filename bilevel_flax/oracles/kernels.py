"""Kernels that cannot be differentiated twice: a reference implementation lends them its tangents.

A fused kernel (cuDNN's and Pallas's attention) has a value and, by a `custom_vjp`, a first
gradient, and nothing more. With the same function written in ordinary JAX beside it, gradients
are the kernel's, and the reference is run in the tangents alone (`kernel_rules`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jax.extend.core import jaxpr_as_fun

from bilevel_flax.base import PyTree
from bilevel_flax.oracles.agreement import compared, disagreement
from bilevel_flax.oracles.float_leaves import floats, of_floats, with_floats
from bilevel_flax.oracles.jaxprs import coarsest, float_dtypes, rewritten
from bilevel_flax.oracles.kernel_rules import Opaque, kernel, opaque_p
from bilevel_flax.oracles.stops import first_stop, second_stop
from bilevel_flax.tree import is_inexact

_CALLS = 8  # on numbers that are compared at most, where they keep telling nothing
_CONTEXT = "jax_default_matmul_precision", "jax_enable_x64"


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
        self._doubts: dict[_Call, tuple[set[str], int]] = {}  # (not yet compared, calls left)

    def __call__(self, *args: Any, **kwargs: Any) -> PyTree:
        """The kernel's value. The first calls on numbers, with these settings, compare the two.

        One call is enough, unless its numbers tell nothing of some output or gradient (queries and
        keys of zeros, as a network is initialised with): then the next ones compare them too.

        Raises:
            TypeError: a setting cannot be hashed; or as `check`.
            ValueError: as `check`.
        """
        leaves, call = _arrays(args, kwargs, _name(self.fast))
        doubts, calls = self._doubts.get(call, ({""}, _CALLS))
        if doubts and calls and not any(isinstance(a, core.Tracer) for a in leaves):
            self.check(*args, **kwargs)
        traced = self._trace(leaves, call)
        return jax.tree.unflatten(traced.tree, traced.kernel(*leaves))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compares values and gradients of kernel and reference on these arguments.

        Raises:
            TypeError: the kernel cannot be differentiated once, or the reference twice; names what
                stops it.
            ValueError: they differ by more than rounding; names the output or argument.
        """
        leaves, call = _arrays(args, kwargs, _name(self.fast))
        with core.ensure_compile_time_eval():
            traced = self._trace(leaves, call)
            fast, reference = traced.fast(*leaves), traced.reference(*leaves)
        names = [f"output {i}" for i in range(len(traced.kernel.shapes))]
        pairs = zip(call.names, leaves, strict=True)
        names += [f"the gradient in argument {name}" for name, leaf in pairs if is_inexact(leaf)]
        if found := disagreement(names, fast, reference, traced.eps):
            raise ValueError(
                f"with_reference: {_name(self.fast)} and its reference differ: {found}; give both "
                "the same scale, mask and layout"
            )
        doubts, calls = self._doubts.get(call, (set(names), _CALLS))
        self._doubts[call] = doubts - set(compared(names, reference, traced.eps)), calls - 1

    def _trace(self, leaves: list, call: _Call) -> _Traced:
        # The context, as `jax.jit` knows, is part of what is computed.
        context = tuple(getattr(jax.config, name) for name in _CONTEXT)
        key = call, context, tuple(jax.typeof(leaf) for leaf in leaves)
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

            _check_derivatives(name, fast, reference, leaves)
            programs = fast_program, plain_program
            computes_in = frozenset().union(*map(float_dtypes, programs))
            whole = kernel(fast, reference, tuple(shapes), computes_in)
            eps = max(map(coarsest, programs))
            runs = _values_and_grads(fast), _values_and_grads(reference)
            self._traced[key] = _Traced(*runs, tree, whole, eps)
        return self._traced[key]


class _Traced(NamedTuple):
    """A kernel for arguments of certain shapes."""

    fast: Callable[..., list]  # its values and gradients, for comparison
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


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call without its arrays: the tree of the arguments, and the settings among them."""

    tree: Any
    settings: tuple = dataclasses.field(compare=False)  # (position in the tree, value)
    told: tuple  # the settings, 1 apart from True and from 1.0
    names: tuple[str, ...]  # of the arrays

    def run(self, function: Callable, leaves: Sequence) -> Any:
        arrays, settings = iter(leaves), dict(self.settings)
        positions = range(self.tree.num_leaves)
        flat = [settings[i] if i in settings else next(arrays) for i in positions]
        args, kwargs = jax.tree.unflatten(self.tree, flat)
        return function(*args, **kwargs)


def _arrays(args: tuple, kwargs: dict, name: str) -> tuple[list, _Call]:
    pairs, tree = jax.tree.flatten_with_path((args, kwargs))
    is_array = [
        hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)
        for _, leaf in pairs
    ]
    arrays = [pair for pair, flag in zip(pairs, is_array, strict=True) if flag]
    settings = tuple((i, leaf) for i, (_, leaf) in enumerate(pairs) if not is_array[i])
    for i, leaf in settings:
        if not isinstance(leaf, Hashable):
            raise TypeError(
                f"with_reference: the argument {jax.tree_util.keystr(pairs[i][0][1:])} of {name} "
                f"is a {type(leaf).__name__}, which is no array and cannot be hashed: pass an "
                "array, or a setting that can be (a tuple, a frozenset, a number ...)"
            )
    numbers = (bool, int, float, complex)
    told = tuple(
        (i, type(leaf), repr(leaf) if isinstance(leaf, numbers) else leaf) for i, leaf in settings
    )
    names = tuple(jax.tree_util.keystr(path[1:]) for path, _ in arrays)
    return [jnp.asarray(leaf) for _, leaf in arrays], _Call(tree, settings, told, names)


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


def _check_derivatives(name: str, fast: Callable, reference: Callable, leaves: list) -> None:
    if found := first_stop(fast, leaves):
        raise TypeError(
            f"with_reference: {name} cannot be differentiated even once, which is stopped by "
            f"{found}: give it a jax.custom_vjp"
        )
    if found := second_stop(reference, leaves):
        raise TypeError(
            f"with_reference: the reference of {name} cannot be differentiated twice by "
            f"forward_over_reverse, which is stopped by {found}: write it in ordinary JAX, and "
            "hand over the kernel first, with_reference(kernel, reference)"
        )


def _values_and_grads(function: Callable[..., list]) -> Callable[..., list]:
    @jax.jit
    def run(*leaves):
        moving = of_floats(with_floats(function), leaves)
        values, pull, outs = jax.vjp(moving, *floats(leaves), has_aux=True)
        keys = jax.random.split(jax.random.key(0), max(len(values), 1))
        cotangents = [
            jax.random.normal(key, out.shape, out.dtype)
            for key, out in zip(keys, values, strict=False)
        ]
        return [outs, list(pull(cotangents))]

    return run


def _name(function: Callable) -> str:
    while not hasattr(function, "__name__") and hasattr(function, "func"):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
