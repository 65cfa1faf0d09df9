"""The derivatives of a kernel with a reference: what each operation becomes.

With f the kernel, r its reference, a the arguments and c a cotangent,

    kernel(a) = f(a)                    its derivative along t is pushed(a, t)
    pushed(a, t) = ∇r(a) t              transposed: pulled(a, c); derivative in a: that of ∇r(a) t
    pulled(a, c) = ∇f(a)ᵀ c             derivative: that of (a, c) -> ∇r(a)ᵀ c

so a first gradient is the kernel's own backward pass, with the residuals that its forward pass
kept, and whatever is differentiated once more is the reference's. Integers, among arguments and
among outputs, have no tangents, and tangents and cotangents below are those of the floats alone.

Two primitives carry them. A `jax.custom_jvp` would not do: where a loop is differentiated twice,
JAX evaluates it partially and drops the rule, and `linear_call` knows no tangent of its residuals.

Kernels that say how they are partitioned (cuDNN's attention) are lowered for certain devices, and
JAX decides by the primitives that it sees in a program whether lowering is told of any. Kernels
are out of sight here, so each `kernel_with_reference` carries a program in sight that asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun, unmapped_aval
from jax.interpreters import ad, batching, mlir

from bilevel_flax.oracles.float_leaves import floats, of_floats, with_floats
from bilevel_flax.tree import is_inexact

# Abstract values, which know along which axes of a mesh an array varies, too.
Shapes = tuple[Any, ...]

opaque_p = Primitive("kernel_with_reference")
pushed_p = Primitive("pushed_by_reference")
opaque_p.multiple_results = pushed_p.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """A function of a flat list of arrays with a derivative of its own.

    Attributes:
        run: `run(*leaves) -> outputs`.
        jvp: `jvp(leaves, tangents) -> (outputs, tangents)`; the tangent of an integer is None,
            on both sides.
        shapes: of the outputs.
        computes_in: the floating-point types inside, which no equation of the program shows.
        instead: what takes its place where kernels are left out, or None.
    """

    run: Callable[..., Sequence]
    jvp: Callable[[Sequence, Sequence], tuple[Sequence, Sequence]]
    shapes: Shapes
    computes_in: frozenset = frozenset()
    instead: Opaque | None = None

    def __call__(self, *leaves: Any) -> list:
        """The outputs."""
        return opaque_p.bind(*leaves, function=self, devices=_asks_for_devices())

    def batched(self, axes: tuple, size: int) -> Opaque:
        """Of arrays with one more axis."""
        run = jax.vmap(self.run, axes, axis_size=size)
        jvp = jax.vmap(self.jvp, (axes, axes), axis_size=size)
        instead = None if self.instead is None else self.instead.batched(axes, size)
        shapes, jvp_of = batched(self.shapes, size), lambda *args: jvp(*map(tuple, args))
        return Opaque(run, jvp_of, shapes, self.computes_in, instead)


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear map at a point, and its transpose.

    Attributes:
        push: `push(at, tangents) -> tangents of the outputs`.
        pull: `pull(at, cotangents) -> cotangents`, one for each of the tangents.
        shapes: of the outputs.
        points: how many arrays `at` is.
    """

    push: Callable[[Sequence, Sequence], Sequence]
    pull: Callable[[Sequence, Sequence], Sequence]
    shapes: Shapes
    points: int

    def __call__(self, at: Sequence, tangents: Sequence) -> list:
        """The tangents of the outputs."""
        return pushed_p.bind(*at, *tangents, map=self)

    def batched(self, axes: tuple, size: int) -> Linear:
        """Of points with one more axis; tangents and cotangents have it in front."""

        def mapped(function):
            by_axis = jax.vmap(function, (axes, 0), axis_size=size)
            return lambda at, along: by_axis(tuple(at), tuple(along))

        return Linear(mapped(self.push), mapped(self.pull), batched(self.shapes, size), self.points)


@functools.cache
def _asks_for_devices() -> Any:
    """A jaxpr that is lowered for certain devices; it is never run."""
    partitioned = custom_partitioning(lambda a: a)
    partitioned.def_partition(None, sharding_rule="i -> i")
    return jax.make_jaxpr(partitioned)(jax.ShapeDtypeStruct((1,), "int32"))


def kernel(
    fast: Callable[..., list],
    reference: Callable[..., list],
    shapes: Shapes,
    computes_in: frozenset = frozenset(),
) -> Opaque:
    """The operation `fast`, with the derivatives of this module."""

    def by_reference(leaves, tangents):
        moving = of_floats(with_floats(reference), leaves)
        _, moved, outs = jax.jvp(moving, floats(leaves), _given(tangents), has_aux=True)
        return outs, _beside(outs, moved)

    def jvp(leaves, tangents):
        value, linear = _with_residuals(fast, reference, shapes, computes_in, leaves)
        outs = value(*leaves)
        outs, kept = outs[: len(shapes)], outs[len(shapes) :]
        # Residuals move with the arguments, and the rules see to that themselves.
        kept = [jax.lax.stop_gradient(residual) for residual in kept]
        return outs, _beside(outs, linear([*leaves, *kept], _given(tangents)))

    instead = Opaque(reference, by_reference, shapes, computes_in)
    return Opaque(fast, jvp, shapes, computes_in, instead)


def _with_residuals(
    fast, reference, shapes: Shapes, computes_in: frozenset, leaves: Sequence
) -> tuple[Opaque, Linear]:
    """`value(*leaves) -> [*outputs, *residuals]`, and the `Linear` of leaves and residuals."""
    trees, count, outputs = [], len(leaves), len(shapes)
    moving_reference = lambda *leaves: floats(reference(*leaves))

    def forward(*leaves):
        moving = of_floats(with_floats(fast), leaves)
        _, pull, outs = jax.vjp(moving, *floats(leaves), has_aux=True)
        residuals, tree = jax.tree.flatten(pull)
        trees.append(tree)
        return [*outs, *residuals]

    closed = jax.make_jaxpr(forward)(*leaves)
    # Residuals that are arguments handed through are not kept twice.
    places = {id(var): i for i, var in enumerate(closed.jaxpr.invars)}
    where = [places.get(id(var)) for var in closed.jaxpr.outvars[outputs:]]
    new = [i for i, at in enumerate(where) if at is None]
    kept_shapes = tuple(closed.out_avals[outputs + i] for i in new)

    def run_value(*leaves):
        out = jaxpr_as_fun(closed)(*leaves)
        return [*out[:outputs], *(out[outputs + i] for i in new)]

    def value_jvp(leaves, tangents):
        out = value(*leaves)
        moved = linear([*leaves, *map(jax.lax.stop_gradient, out[outputs:])], _given(tangents))
        return out, [*_beside(shapes, moved), *(None for _ in new)]

    def run_pulled(*operands):
        leaves, kept = operands[:count], iter(operands[count : count + len(new)])
        residuals = [next(kept) if at is None else leaves[at] for at in where]
        pull = jax.tree.unflatten(trees[0], residuals)
        return list(pull(list(operands[count + len(new) :])))

    def pulled_jvp(operands, tangents):
        leaves, cotangents = operands[:count], list(operands[count + len(new) :])

        def by_reference(moving, cotangents):
            return list(jax.vjp(of_floats(moving_reference, leaves), *moving)[1](cotangents))

        along = _given(tangents[:count]), list(tangents[count + len(new) :])
        moved = jax.jvp(by_reference, (floats(leaves), cotangents), along)[1]
        return pulled(*operands), moved

    def push(at, tangents):
        leaves = at[:count]
        return jax.jvp(of_floats(moving_reference, leaves), floats(leaves), list(tangents))[1]

    like_floats = tuple(jax.typeof(leaf) for leaf in floats(leaves))
    value = Opaque(run_value, value_jvp, (*shapes, *kept_shapes), computes_in)
    pulled = Opaque(run_pulled, pulled_jvp, like_floats, computes_in)
    moving_shapes = tuple(floats(shapes))
    linear = Linear(push, lambda at, cts: pulled(*at, *cts), moving_shapes, count + len(new))
    return value, linear


def _beside(outs: Sequence, tangents: Sequence) -> list:
    """The tangents of all outputs, None for those of integers."""
    rest = iter(tangents)
    return [next(rest) if is_inexact(out) else None for out in outs]


def _given(tangents: Sequence) -> list:
    return [t for t in tangents if t is not None]


def batched(shapes: Shapes, size: int) -> Shapes:
    """The shapes with one more axis in front."""
    return tuple(unmapped_aval(size, 0, aval) for aval in shapes)


def _axis_size(operands: Sequence, axes: Sequence) -> int:
    return next(x.shape[d] for x, d in zip(operands, axes, strict=True) if d is not None)


def _along(primals: Sequence, tangents: Sequence) -> list:
    """Tangents as arrays, None for those of integers."""
    pairs = zip(primals, tangents, strict=True)
    return [ad.instantiate_zeros(t) if is_inexact(leaf) else None for leaf, t in pairs]


def _opaque_jvp(primals, tangents, *, function, devices):
    del devices
    outs, moved = function.jvp(primals, _along(primals, tangents))
    zero = lambda out: ad.Zero(jax.typeof(out).to_tangent_aval())
    return outs, [zero(o) if t is None else t for o, t in zip(outs, moved, strict=True)]


def _opaque_batched(operands, axes, *, function, devices):
    del devices
    function = function.batched(tuple(axes), _axis_size(operands, axes))
    return function(*operands), [0] * len(function.shapes)


def _pushed_jvp(primals, tangents, *, map):
    at, along = primals[: map.points], primals[map.points :]
    moves, turns = tangents[: map.points], tangents[map.points :]
    out, terms = map(at, along), []
    if any(type(t) is not ad.Zero for t in turns):
        terms.append(map(at, [ad.instantiate_zeros(t) for t in turns]))
    if any(type(t) is not ad.Zero for t, a in zip(moves, at, strict=True) if is_inexact(a)):
        by_point = of_floats(lambda *at: map.push(at, along), at)
        terms.append(jax.jvp(by_point, floats(at), _given(_along(at, moves)))[1])
    return out, [sum(term[1:], term[0]) for term in zip(*terms, strict=True)]


def _pushed_transposed(cotangents, *operands, map):
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    return [*(None,) * map.points, *map.pull(operands[: map.points], cotangents)]


def _pushed_batched(operands, axes, *, map):
    size, points = _axis_size(operands, axes), map.points
    # Tangents carry the axis even where they are all the same: so do the cotangents then.
    along = [
        batching.bdim_at_front(t, d, size)
        for t, d in zip(operands[points:], axes[points:], strict=True)
    ]
    map = map.batched(tuple(axes[:points]), size)
    return map(operands[:points], along), [0] * len(map.shapes)


def _run_opaque(*leaves, function, devices):
    del devices
    return list(function.run(*leaves))


def _run_pushed(*operands, map):
    return list(map.push(operands[: map.points], operands[map.points :]))


opaque_p.def_impl(_run_opaque)
opaque_p.def_abstract_eval(lambda *avals, function, devices: list(function.shapes))
mlir.register_lowering(opaque_p, mlir.lower_fun(_run_opaque, multiple_results=True))
ad.primitive_jvps[opaque_p] = _opaque_jvp
batching.primitive_batchers[opaque_p] = _opaque_batched

pushed_p.def_impl(_run_pushed)
pushed_p.def_abstract_eval(lambda *avals, map: list(map.shapes))
mlir.register_lowering(pushed_p, mlir.lower_fun(_run_pushed, multiple_results=True))
ad.primitive_jvps[pushed_p] = _pushed_jvp
ad.primitive_transposes[pushed_p] = _pushed_transposed
batching.primitive_batchers[pushed_p] = _pushed_batched
