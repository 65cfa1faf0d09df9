"""`optax.lookahead` where the parameters are one tree: the slow copy lies in the optimiser's state.

Optax hands it a pair, of which a loss sees the fast copy. Here z (or v, or x) is that copy, in
every method, and the state holds how far it is ahead of the slow one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.base import PyTree
from bilevel_flax.checks import UserError
from bilevel_flax.tree import filter_inexact


class LookaheadState(NamedTuple):
    """State of `optax.lookahead`, and of a chain that ends in it.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> loss = lambda z, x, b: (z - x) ** 2
        >>> inner = optax.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5)
        >>> solver = bf.soba(bf.Problem(loss, loss), inner=inner, outer=optax.sgd(0.1))
        >>> z = optax.LookaheadParams(fast=jnp.array(3.0), slow=jnp.array(2.0))
        >>> state = solver.init(z, jnp.array(0.0))  # or of `z.fast` alone: both are the same then
        >>> float(state.inner_params), float(state.inner_opt_state.ahead)
        (3.0, 1.0)
        >>> float(slow_params(state.inner_params, state.inner_opt_state))
        2.0
    """

    ahead: PyTree  # fast - slow: v's optimiser may be handed others in the place of its parameters
    inner: PyTree  # Optax's own state


def slow_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """The slow copy of z (or x), which networks under `optax.lookahead` are tested with.

    Args:
        params: `state.inner_params`.
        opt_state: `state.inner_opt_state`.

    Raises:
        UserError: the optimiser is another.
    """
    if not isinstance(opt_state, LookaheadState):
        raise UserError(
            f"opt_state is {type(opt_state).__name__}, not that of optax.lookahead(...)"
        )
    return _minus(params, opt_state.ahead)


def init(transform: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The state of any optimiser; with the two copies at one place where it is `optax.lookahead`.

    Raises:
        UserError: something that does not know of the two copies stands around `optax.lookahead`.
    """
    if not _takes_pairs(transform):
        return transform.init(params)
    state = transform.init(optax.LookaheadParams.init_synced(params))
    last = state[-1] if type(state) is tuple else state  # a chain's state is a tuple
    if _count(state) != 1 or not isinstance(last, optax.LookaheadState):
        raise UserError(
            "optax.lookahead keeps two copies of the parameters, which what stands around it does "
            "not know: put it outermost, optax.lookahead(optax.MultiSteps(...), ...), or last in "
            "an optax.chain"
        )
    return LookaheadState(jax.tree.map(jnp.zeros_like, params), state)


def update(
    transform: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """The update of any optimiser, of the fast copy alone."""
    if not isinstance(state, LookaheadState):
        return transform.update(updates, state, params, **extra_args)
    pair = optax.LookaheadParams(fast=params, slow=_minus(params, state.ahead))
    moved: Any  # a pair too; Optax's type says "a tree of arrays"
    moved, inner = transform.update(updates, state.inner, pair, **extra_args)
    gone = lambda a, f, s: (a + f - s).astype(a.dtype)
    ahead = jax.tree.map(gone, state.ahead, moved.fast, moved.slow)
    return moved.fast, LookaheadState(ahead, inner)


def fast_of(params: PyTree) -> PyTree:
    """The copy that losses see; parameters that are no pair are their own."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def started(name: str, state: PyTree, params: PyTree) -> PyTree:
    """A fresh optimiser's state with the slow copy of a user's pair.

    Raises:
        UserError: a pair, but the optimiser is not `optax.lookahead`.
    """
    if not isinstance(params, optax.LookaheadParams):
        return state
    if not isinstance(state, LookaheadState):
        raise UserError(
            f"{name}_params=optax.LookaheadParams(...) go with {name}=optax.lookahead(...) only: "
            f"pass the parameters alone, {name}_params.fast"
        )
    return state._replace(ahead=_minus(*map(filter_inexact, params)))


def _minus(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a if b is None else a - b, one, other)


@functools.lru_cache(maxsize=16)
def _takes_pairs(transform: optax.GradientTransformation) -> bool:
    """Whether `optax.lookahead` is part of it. Asked with a pair: without one it complains."""
    try:
        return _count(transform.init(optax.LookaheadParams.init_synced(()))) > 0
    except Exception:  # of labels and masks for a tree of their own: these know of no pair
        return False


def _count(state: PyTree) -> int:
    if isinstance(state, LookaheadState):
        return 0
    nodes = jax.tree.leaves(
        state, is_leaf=lambda node: isinstance(node, (optax.LookaheadState, LookaheadState))
    )
    inside = [node for node in nodes if isinstance(node, optax.LookaheadState)]
    return len(inside) + sum(_count(node.fast_state) for node in inside)
