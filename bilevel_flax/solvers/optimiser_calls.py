"""An optimiser's update called with small arrays, and its answers compared.

An Optax transformation is two opaque functions; what it does is found out by calling them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel_flax.base import PyTree
from bilevel_flax.solvers.step import tolerant
from bilevel_flax.solvers.waiting import about_to_act
from bilevel_flax.tree import depends_on, filter_inexact

_LONGEST_SIDE = 3
_ROUNDING = 1e-3


@contextlib.contextmanager
def while_tracing() -> Iterator[None]:
    """Numbers of a few bytes, though a trainer may forbid transfers within its step."""
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        yield


def zeros_in_shape(tree: PyTree) -> PyTree:
    """Zeros in the shapes of a tree whose values do not matter."""
    return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), leaf.dtype), tree)


def one_update(
    transform: Any,
    outer_params: PyTree,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    value: Any = 0.0,
) -> tuple[PyTree, PyTree]:
    """An update, with stand-ins for what a loop hands over beside the gradient."""
    value = jnp.asarray(value)
    return tolerant(transform).update(
        gradient,
        state,
        params,
        value=value,
        grad=gradient,
        value_fn=lambda params: value + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)),
        grad_fn=lambda params, _: gradient,
        outer_params=outer_params,
    )


def acting_update(
    transform: Any,
    outer_params: PyTree,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    value: Any = 0.0,
    times: int = 1,
) -> PyTree:
    """The last of some updates, each the one in which an optimiser that gathers gradients acts.

    Raises:
        ValueError: the optimiser is made of numbers that are traced.
    """
    # One program for all questions: operation by operation each would be compiled by itself.
    ask = _compiled(transform)

    def advance(state):
        return ask(outer_params, gradient, state, params, value)

    updates = None
    for _ in range(times):
        updates, state = advance(about_to_act(lambda old: advance(old)[1], state))
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(updates)):
            raise ValueError(
                "inner takes steps that are traced (a learning rate under vmap or jit), so what it "
                "does cannot be asked: make the solver with numbers, or pass adjoint="
            )
    return updates


@functools.lru_cache(maxsize=4)
def _compiled(transform: Any) -> Callable[..., tuple[PyTree, PyTree]]:
    return jax.jit(functools.partial(one_update, transform))


class Asked(NamedTuple):
    """An optimiser as it answers to questions, on small arrays."""

    update: Callable[..., PyTree]  # of gradient, state, parameters and the loss's value
    floats: PyTree
    reads_params: bool
    reads_value: bool


def asked(transform: Any, opt_state: PyTree, params: PyTree, outer_params: PyTree) -> Asked:
    """An optimiser's update, and whether it looks at parameters and at the loss's value."""
    floats = filter_inexact(params)
    shapes = jax.eval_shape(lambda *trees: trees, floats, opt_state, outer_params)
    reads_params, reads_value = _reads(
        transform, jax.tree.structure(shapes), *jax.tree.leaves(shapes)
    )

    def update(*args, **settings):
        return acting_update(transform, zeros_in_shape(shapes[2]), *args, **settings)

    return Asked(update, floats, reads_params, reads_value)


# A step asks several times, with the same shapes.
@functools.lru_cache(maxsize=16)
def _reads(transform: Any, structure: Any, *leaves: jax.ShapeDtypeStruct) -> tuple[bool, bool]:
    floats, opt_state, outer_params = jax.tree.unflatten(structure, leaves)

    def update(*args):
        return one_update(transform, zeros_in_shape(outer_params), *args)[0]

    used = depends_on(update, floats, opt_state, floats, jax.ShapeDtypeStruct((), jnp.float32))
    return any(used[-1 - len(jax.tree.leaves(floats)) : -1]), used[-1]


# In NumPy from here on, where it may be: what JAX does on numbers is compiled for every shape.


def at_step(state: PyTree, step: int) -> PyTree:
    """The state of an optimiser, fresh but for its counters."""

    def counter(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jnp.asarray(np.full(leaf.shape, step, leaf.dtype))

    return jax.tree.map(counter, state)


def scaled(tree: PyTree, factor: float) -> PyTree:
    """A tree times a number, each leaf in its dtype."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) * np.asarray(factor, leaf.dtype)), tree
    )


def small(leaf: Any) -> jax.Array:
    """An array of the same rank, of numbers of both signs that differ."""
    shape = tuple(min(side, _LONGEST_SIDE) for side in leaf.shape)
    values = 3.0 + np.arange(int(np.prod(shape)))
    values[1::2] *= -1
    return jnp.asarray(values.reshape(shape), leaf.dtype)


def parallel(one: PyTree, other: PyTree) -> bool:
    """Whether each leaf is a multiple of the other tree's, to rounding."""
    pairs = zip(*(jax.tree.leaves(tree) for tree in (one, other)), strict=True)
    return all(near(a, b * (np.vdot(b, a) / np.vdot(b, b))) for a, b in pairs if b.size)


def largest(tree: PyTree) -> float:
    """The largest absolute value."""
    return max(float(np.max(np.abs(leaf), initial=0.0)) for leaf in _arrays(tree))


def finite(tree: PyTree) -> bool:
    """Whether all numbers are."""
    return all(bool(np.isfinite(leaf).all()) for leaf in _arrays(tree))


def near(one: PyTree, other: PyTree) -> bool:
    """Whether two trees are the same to rounding, each leaf measured by its largest number."""

    def close(a, b):
        size = max(float(np.max(np.abs(a))), float(np.max(np.abs(b))))
        return float(np.max(np.abs(a - b))) <= _ROUNDING * size

    return all(close(a, b) for a, b in zip(_arrays(one), _arrays(other), strict=True) if a.size)


def _arrays(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
