"""Modules taken apart into plain dicts of arrays, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bilevel_flax.base import PyTree


class Template(NamedTuple):
    """What is left of a module when its arrays are taken out, and how to put them back."""

    graphdef: Any
    learned: nnx.State  # what z or x is made of
    rest: nnx.State  # mutable: BatchNorm's statistics, parameters held fixed, counters
    streams: nnx.State  # dropout's keys and counters

    def module(self, params: PyTree, rest: PyTree, rng: jax.Array | None) -> Any:
        """A new module around these arrays."""
        states = (filled(self.learned, params), filled(self.rest, rest))
        # Without the copy, what the loss does to the module would leak out of its trace.
        return nnx.merge(self.graphdef, *states, seeded(self.streams, rng), copy=True)


def is_module(node: Any) -> bool:
    """Whether a node of a pytree is a module (for `is_leaf=`)."""
    return isinstance(node, nnx.Pytree)


def template_of(module: Any, wrt: Any) -> Template:
    """The module taken apart; `wrt` selects what is learned."""
    graphdef, learned, streams, rest = nnx.split(module, wrt, nnx.RngState, ...)
    return Template(graphdef, learned, rest, streams)


def value_of(leaf: Any) -> Any:
    """The array in a Variable; anything else as it is."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def with_value(leaf: Any, value: Any) -> Any:
    """A new Variable of the same kind around another array."""
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def paths(state: nnx.State) -> dict[tuple, Any]:
    """The State's Variables by their paths."""
    return dict(nnx.to_flat_state(state))


def plain(state: nnx.State) -> dict:
    """The arrays of a State in plain nested dicts."""
    tree: dict = {}
    for path, leaf in paths(state).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value_of(leaf)
    return tree


def filled(template: nnx.State, values: PyTree) -> nnx.State:
    """The State with other arrays, from plain nested dicts."""

    def at(path):
        node = values
        for key in path:
            node = node[key]
        return node

    flat = [(path, with_value(leaf, at(path))) for path, leaf in paths(template).items()]
    return nnx.from_flat_state(flat)


# Of the keys that a loss draws for itself, apart from the module's streams.
_OWN_STREAM = 2**31 - 1


def _typed(rng: jax.Array) -> jax.Array:
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    return rng if typed else jax.random.wrap_key_data(rng)


def rngs_from(rng: jax.Array | None) -> nnx.Rngs:
    """The `nnx.Rngs` that a loss is handed; without a key a fixed one (shapes are all that counts).

    Args:
        rng: the step's key.
    """
    return nnx.Rngs(0 if rng is None else jax.random.fold_in(_typed(rng), _OWN_STREAM))


def seeded(streams: nnx.State, rng: jax.Array | None) -> nnx.State:
    """The random streams with new keys drawn from `rng`, their counters as they were."""
    if rng is None:
        return streams
    run_key = _typed(rng)
    flat = []
    for position, (path, leaf) in enumerate(paths(streams).items()):
        value = value_of(leaf)
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            key = jax.random.fold_in(run_key, position)
            # Streams of layers made under vmap are arrays of keys.
            value = jax.random.split(key, value.shape) if value.shape else key
        flat.append((path, with_value(leaf, value)))
    return nnx.from_flat_state(flat)


def check_model(model: Any, wrt: Any) -> None:
    """Raises unless `model` is a module with something to learn.

    Raises:
        TypeError: it is no `nnx.Module`.
        ValueError: `wrt` selects nothing in it.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, got {type(model).__name__}: linen modules and plain "
            "functions go to bf.Problem(inner_loss, outer_loss)"
        )
    if not paths(nnx.state(model, wrt)):
        kinds = sorted({type(leaf).__name__ for leaf in paths(nnx.state(model)).values()})
        raise ValueError(
            f"{type(model).__name__} has no variable that wrt={wrt!r} selects, so there is "
            f"nothing to learn; it has {', '.join(kinds) or 'no variables at all'}"
        )


def check_fits(name: str, params: PyTree, template: nnx.State, owner: str) -> None:
    """Raises unless `params` has the tree of the module that the problem was made for.

    Raises:
        ValueError: the trees differ.
    """
    expected = jax.tree.structure(plain(template))
    if jax.tree.structure(params) != expected:
        raise ValueError(
            f"{name} does not fit the {owner} that bf.nnx.problem was given: "
            f"{jax.tree.structure(params)} against {expected}; make the state with "
            "bf.nnx.init(solver, model, outer) or bf.nnx.Optimizer, with the same wrt"
        )


def map_modules(function: Callable, other: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps the modules of a tree one way and its remaining leaves another."""

    def apply(node, *others):
        return function(node, *others) if is_module(node) else other(node, *others)

    return jax.tree.map(apply, tree, *rest, is_leaf=is_module)


def is_template(node: Any) -> bool:
    """Whether a node stands for a module (for `is_leaf=`)."""
    return isinstance(node, Template)


def moved(rest: nnx.State, module: nnx.Module) -> dict:
    """The mutable variables after a call; new ones (sown intermediates) are not kept."""
    now = paths(nnx.state(module))
    known = [(path, with_value(leaf, value_of(now[path]))) for path, leaf in paths(rest).items()]
    return plain(nnx.from_flat_state(known))
