"""Optimisers that act in every k-th of their calls (`optax.MultiSteps`), brought to the k-th.

Asked at another call they seem to do nothing. K is opaque: it is read off the counter, which goes
from m to m + 1 as long as m + 1 < k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import PyTree

_COUNTERS = {optax.MultiStepsState: "mini_step", optax.ApplyEvery: "count"}
_BY_STEP = (optax.ConditionallyTransformState, optax.ConditionallyMaskState)
# A schedule may start at 0, and then nothing is seen at the first step.
_STEPS = (0, 1, 10, 1000)
_STEPS_OF_CONDITIONS = (*range(12), 100, 1000, 10_000, 1_000_000)


def telling_steps(state: PyTree) -> tuple[int, ...]:
    """Steps at which an optimiser shows what it does."""
    return _STEPS_OF_CONDITIONS if _nodes(state, _BY_STEP) else _STEPS


def calls_in_a_step(ready: PyTree) -> int:
    """K, the gradients that `optax.MultiSteps` gathers, of a state that is about to act."""
    return max([1, *(int(node.mini_step) + 1 for node in _nodes(ready, optax.MultiStepsState))])


def about_to_act(advance: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
    """The state just before the call in which it acts, as if all calls before were like this one.

    Args:
        advance: state -> state, the update with a gradient and parameters; on concrete arrays.
        state: of the optimiser.
    """
    waiting = _nodes(state, tuple(_COUNTERS))
    if not waiting:
        return state
    calls = [_calls(advance, state, which, len(waiting)) for which in range(len(waiting))]
    first, second = (_at(state, [min(c, k - 1) for k in calls]) for c in (0, 1))
    once = _nodes(advance(first), optax.MultiStepsState)
    twice = _nodes(
        advance(_gathered(second, [node.acc_grads for node in once])), optax.MultiStepsState
    )
    ks = [
        k for node, k in zip(waiting, calls, strict=True) if isinstance(node, optax.MultiStepsState)
    ]
    gathered = []
    for k, before, one, two in zip(
        ks, _nodes(state, optax.MultiStepsState), once, twice, strict=True
    ):
        if k == 1:
            gathered.append(before.acc_grads)
        elif k == 2:
            gathered.append(one.acc_grads)
        else:  # a mean stays as it is, a sum grows
            gathered.append(_extrapolated(one.acc_grads, two.acc_grads, k - 2))
    return _gathered(_at(state, [k - 1 for k in calls]), gathered)


def _extrapolated(one: PyTree, two: PyTree, times: int) -> PyTree:
    return jax.tree.map(lambda a, b: a + (times * (b - a)).astype(a.dtype), one, two)


def _nodes(state: PyTree, kinds: Any) -> list[Any]:
    is_kind = lambda node: isinstance(node, kinds)
    return [node for node in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(node)]


def _replaced(state: PyTree, kinds: Any, change: Callable[[Any, Any], Any], values: Sequence):
    left = iter(values)
    is_kind = lambda node: isinstance(node, kinds)
    put = lambda node: change(node, next(left)) if is_kind(node) else node
    return jax.tree.map(put, state, is_leaf=is_kind)


def _at(state: PyTree, counts: Sequence[int]) -> PyTree:
    def set_counter(node, count):
        name = _COUNTERS[type(node)]
        return node._replace(**{name: jnp.full_like(getattr(node, name), count)})

    return _replaced(state, tuple(_COUNTERS), set_counter, counts)


def _gathered(state: PyTree, gathered: Sequence[PyTree]) -> PyTree:
    put = lambda node, acc_grads: node._replace(acc_grads=acc_grads)
    return _replaced(state, optax.MultiStepsState, put, gathered)


def _calls(advance: Callable[[PyTree], PyTree], state: PyTree, which: int, count: int) -> int:
    """K of one of the optimisers that wait."""

    def goes_on(m):
        node = _nodes(
            advance(_at(state, [m * (i == which) for i in range(count)])), tuple(_COUNTERS)
        )[which]
        return int(getattr(node, _COUNTERS[type(node)])) == m + 1

    low, high = -1, 0
    while goes_on(high):
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if goes_on(middle) else (low, middle)
    return high + 1
