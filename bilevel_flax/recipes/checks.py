"""What `clean` cannot begin with: each mistake in one line, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.recipes.networks import Network

_MOST_NAMED = 5
_FUNCTIONS = {
    "penalty": "penalty=lambda params: 1e-4 * optax.tree.norm(params, squared=True)",
    "log": "log=print",
}


def functions(**given: Callable | None) -> None:
    """Raises unless `penalty` and `log` are functions, or None.

    Raises:
        TypeError: names the argument.
    """
    for name, value in given.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}={value!r:.40} is no function: pass {_FUNCTIONS[name]}")


def inputs_alike(name: str, inputs: np.ndarray, train: np.ndarray) -> None:
    """Raises unless inputs have the training set's shape, and are integers if those are.

    Bytes beside numbers in [0, 1] are pictures in two units, and a network knows one.

    Raises:
        ValueError: names both.
    """
    if inputs.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"train has inputs of shape {list(train.shape[1:])}, {name} of {list(inputs.shape[1:])}"
        )
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if any(jnp.issubdtype(inputs.dtype, k) != jnp.issubdtype(train.dtype, k) for k in kinds):
        raise ValueError(
            f"train has inputs of {train.dtype}, {name} of {inputs.dtype}: scale both alike, as "
            "the network wants them"
        )


def num_classes(given: np.ndarray, known: np.ndarray) -> int:
    """K, if there are two classes or more, each with a clean example.

    Raises:
        ValueError: names the classes that have none.
    """
    count, there = int(max(given.max(), known.max())) + 1, np.unique(known)
    if len(there) < count:
        some = np.setdiff1d(np.arange(min(count, len(there) + _MOST_NAMED)), there)[:_MOST_NAMED]
        missing = ", ".join(map(str, some.tolist()))
        if count - len(there) > len(some):
            missing += f" ... ({count - len(there)} in all)"
        raise ValueError(
            f"clean has no example of class {missing}, and labels go up to {count - 1}: add "
            "some, one will do, or leave the class out of train"
        )
    if count < 2:
        raise ValueError("there is only one class: nothing to tell apart")
    return count


def network(network: Network, inputs: np.ndarray, num_classes: int) -> None:
    """Raises unless a network has one logit for each class.

    Raises:
        ValueError: names what it returns.
    """

    def logits(inputs):
        key = jax.random.key(0)
        return network.apply(*network.init(key, inputs[:1]), inputs, False, key)[0]

    size = min(2, len(inputs))
    shape = jax.eval_shape(logits, jnp.asarray(inputs[:size])).shape
    if shape != (size, num_classes):
        raise ValueError(
            f"model returns {list(shape)} for {size} inputs, but labels go from 0 to "
            f"{num_classes - 1}: it must return a logit for each class, [batch, {num_classes}]"
        )
