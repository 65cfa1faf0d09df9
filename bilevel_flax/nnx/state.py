"""From modules to a `TrainState`, and back into the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
from flax import nnx

from bilevel_flax.base import PyTree, TrainState
from bilevel_flax.nnx.modules import check_model, filled, map_modules, plain, template_of

_T = TypeVar("_T", covariant=True)


class _Starts(Protocol[_T]):
    @property
    def init(self) -> Callable[..., _T]: ...


def params(tree: PyTree, *, wrt: Any = nnx.Param) -> PyTree:
    """A tree's modules as plain nested dicts of their Params, its other leaves as they are.

    Args:
        tree: a module, arrays, or a pytree of both.
        wrt: which variables.

    Example:
        >>> from flax import nnx
        >>> import bilevel_flax as bf
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> bf.nnx.params({"net": model})["net"]["kernel"].shape
        (2, 1)
    """
    return map_modules(lambda node: plain(nnx.state(node, wrt)), lambda leaf: leaf, tree)


def init(
    solver: _Starts[_T],
    model: nnx.Module,
    outer: PyTree,
    *,
    wrt: Any = nnx.Param,
    rng: jax.Array | None = None,
) -> _T:
    """A fresh state for a `problem`, with the module's present values.

    Args:
        solver: any solver of the problem, or its `bf.directions`.
        model: the module to start from.
        outer: x to start from, arrays and modules as given to `problem`.
        wrt: as given to `problem`.
        rng: key of the run: dropout draws from it. None: a fixed one.

    Raises:
        TypeError: `model` is no `nnx.Module`.
        ValueError: there is nothing to learn in `model`.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> from flax import nnx
        >>> def inner_loss(model, x, batch):
        ...     return jnp.mean(model(batch) ** 2) + jnp.exp(x) * jnp.sum(model.kernel[...] ** 2)
        >>> def outer_loss(model, x, batch):
        ...     return jnp.mean((model(batch) - 1) ** 2)
        >>> model, x = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.array(-2.0)
        >>> problem = bf.nnx.problem(inner_loss, outer_loss, model, x)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = bf.nnx.init(solver, model, x)
        >>> sorted(state.inner_params)
        ['bias', 'kernel']
    """
    check_model(model, wrt)
    rest = plain(template_of(model, wrt).rest)
    return solver.init(params(model, wrt=wrt), params(outer), model_state=rest or None, rng=rng)


def write(state: TrainState, model: nnx.Module, outer: PyTree = None, *, wrt: Any = nnx.Param):
    """Writes a state's arrays into the modules, in place.

    Args:
        state: what to write.
        model: takes z and the model state.
        outer: modules in it take their part of x; arrays in it stay (see the return value).
        wrt: as given to `problem`.

    Returns:
        x, with the modules of `outer` in it; all of x if `outer` is None.

    Example:
        >>> import jax.numpy as jnp, optax, bilevel_flax as bf
        >>> from flax import nnx
        >>> def inner_loss(model, x, batch):
        ...     return jnp.mean(model(batch) ** 2) + jnp.exp(x) * jnp.sum(model.kernel[...] ** 2)
        >>> def outer_loss(model, x, batch):
        ...     return jnp.mean((model(batch) - 1) ** 2)
        >>> model, x = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.array(-2.0)
        >>> problem = bf.nnx.problem(inner_loss, outer_loss, model, x)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state = bf.nnx.init(solver, model, x)
        >>> state = state.replace(inner_params={"bias": jnp.ones(1), "kernel": jnp.zeros((2, 1))})
        >>> float(bf.nnx.write(state, model)), float(model.bias[0])
        (-2.0, 1.0)
    """
    template = template_of(model, wrt)
    nnx.update(model, filled(template.learned, state.inner_params))
    if state.model_state:
        nnx.update(model, filled(template.rest, state.model_state))
    if outer is None:
        return state.outer_params

    def into(module, values):
        nnx.update(module, filled(nnx.state(module, nnx.Param), values))
        return module

    return map_modules(into, lambda _, value: value, outer, state.outer_params)
