"""From modules to a `TrainState`, and back into the modules."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from bilevel_flax.base import BilevelSolver, PyTree, TrainState
from bilevel_flax.nnx.modules import check_model, filled, map_modules, plain, template_of


def params(tree: PyTree, *, wrt: Any = nnx.Param) -> PyTree:
    """A tree's modules as plain nested dicts of their Params, its other leaves as they are.

    Args:
        tree: a module, arrays, or a pytree of both.
        wrt: which variables.
    """
    return map_modules(lambda node: plain(nnx.state(node, wrt)), lambda leaf: leaf, tree)


def init(
    solver: BilevelSolver,
    model: nnx.Module,
    outer: PyTree,
    *,
    wrt: Any = nnx.Param,
    rng: jax.Array | None = None,
) -> TrainState:
    """A fresh `TrainState` for a `problem`, with the module's present values.

    Args:
        solver: any solver of the problem.
        model: the module to start from.
        outer: x to start from, arrays and modules as given to `problem`.
        wrt: as given to `problem`.
        rng: key of the run: dropout draws from it. None: a fixed one.

    Raises:
        TypeError: `model` is no `nnx.Module`.
        ValueError: there is nothing to learn in `model`.
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
