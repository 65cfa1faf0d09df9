"""A classifier of the user's as two functions: of a Linen or NNX module, or as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bilevel_flax.base import PyTree
from bilevel_flax.nnx.modules import plain, template_of

# What modules call the switch between training and evaluation, and its value in training.
_SWITCHES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class Network(NamedTuple):
    """A classifier.

    Attributes:
        init: `init(rng, inputs) -> (params, model_state)`; inputs are one example [1, ...].
        apply: `apply(params, model_state, inputs, train, rng) -> (logits [batch, classes],
            model_state)`; `train` is a Python bool.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> network = bf.recipes.Network(
        ...     init=lambda rng, inputs: (jnp.zeros((inputs.shape[-1], 3)), {}),
        ...     apply=lambda params, state, inputs, train, rng: (inputs @ params, state),
        ... )
        >>> params, state = network.init(jax.random.key(0), jnp.zeros((1, 2)))
        >>> params.shape
        (2, 3)
    """

    init: Callable[[jax.Array, Any], tuple[PyTree, PyTree]]
    apply: Callable[[PyTree, PyTree, Any, bool, jax.Array], tuple[jax.Array, PyTree]]


def as_network(model: Any) -> Network:
    """Two functions for any classifier.

    Args:
        model: a Linen module; an NNX module, whose parameters are where every training starts; a
            `Network`, or the pair of its functions.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(model, nn.Module):
        return _linen(model)
    if isinstance(model, nnx.Module):
        return _nnx(model)
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return Network(*model)
    what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(
        f"model={what} is no classifier: pass a Linen or NNX module, or (init, apply) with "
        "init(rng, inputs) -> (params, model_state) and "
        "apply(params, model_state, inputs, train, rng) -> (logits, model_state)"
    )


def _linen(module: nn.Module) -> Network:
    names = set(inspect.signature(module.__call__).parameters)
    switch = next((name for name in _SWITCHES if name in names), None)

    def mode(train: bool) -> dict[str, Any]:
        return {} if switch is None else {switch: train == _SWITCHES[switch]}

    def init(rng: jax.Array, inputs: Any) -> tuple[PyTree, PyTree]:
        variables = dict(module.init({"params": rng, "dropout": rng}, inputs, **mode(False)))
        return variables.pop("params"), variables

    def apply(params, model_state, inputs, train, rng):
        variables = {"params": params, **model_state}
        if not train:
            return jnp.asarray(module.apply(variables, inputs, **mode(False))), model_state
        logits, new = module.apply(
            variables, inputs, **mode(True), mutable=list(model_state), rngs={"dropout": rng}
        )
        return logits, dict(new)

    return Network(init, apply)


def _nnx(module: nnx.Module) -> Network:
    module = nnx.clone(module)  # what is trained later must not move the start
    template = template_of(module, nnx.Param)
    start = plain(template.learned), plain(template.rest)

    def init(rng: jax.Array, inputs: Any) -> tuple[PyTree, PyTree]:
        del rng, inputs
        return start

    def apply(params, model_state, inputs, train, rng):
        merged = template.module(params, model_state, rng)
        merged.train() if train else merged.eval()
        logits = merged(inputs)
        if not train:
            return logits, model_state
        return logits, plain(template_of(merged, nnx.Param).rest)

    return Network(init, apply)
