"""What a user's mistake in a loss looks like from inside, told in one line that names the fix."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base.wrapped_loss import WrappedLoss

_STATE = (
    'the network\'s state beside its parameters, e.g. {"batch_stats": variables["batch_stats"]}'
)
_FLAX = {  # Flax's errors about a linen network that is called without its state or its key
    "ScopeCollectionNotFound": f"pass solver.init(..., model_state=...) {_STATE}",
    "ScopeVariableNotFoundError": f"pass solver.init(..., model_state=...) {_STATE}",
    "ModifyScopeVariableError": 'apply it with mutable=["batch_stats"] and return the new state',
    "InvalidRngError": 'hand it the key that the loss is called with, rngs={"dropout": rng}',
}


def explain(
    error: Exception, loss: Callable, name: str, stateful: bool, args: tuple, context: tuple
) -> Exception | None:
    """The error to raise in the place of `error`; None: this one is as good.

    Args:
        error: what the call of the loss raised.
        loss: the user's.
        name: "inner_loss" or "outer_loss".
        stateful: as of the problem.
        args: (inner_params, outer_params, batch), as the loss was given them.
        context: (model_state, rng), which only a stateful loss is given.
    """
    if isinstance(error, TypeError):
        message = _signature(loss, name, stateful)
        if message:
            return TypeError(message)
    if isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error):
        return _none_given(error, name, args[2], context[0] if stateful else {})
    if isinstance(error, KeyError):
        message = _missing_key(error, name, args[2], context[0] if stateful else None)
        return ValueError(message) if message else None
    fix = _FLAX.get(type(error).__name__)
    if fix and type(error).__module__ == "flax.errors":
        first = str(error).split("\n")[0].split(" (https")[0].rstrip(". ")
        stateless = (
            "" if stateful else "make the problem stateful, Problem(..., stateful=True), and "
        )
        return ValueError(f"{name}: {first}: {stateless}{fix}")
    shapes = "incompatible shapes" in str(error) or "broadcast" in str(error)
    if isinstance(error, (TypeError, ValueError)) and name == "inner_loss" and shapes:
        return _rows_expected(error, args[1], args[2])
    return None


def _signature(loss: Callable, name: str, stateful: bool) -> str:
    while isinstance(loss, WrappedLoss):
        loss = loss.loss
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        return ""

    def takes(count: int) -> bool:
        try:
            signature.bind(*range(count))
        except TypeError:
            return False
        return True

    given = 5 if stateful else 3
    if takes(given):
        return ""
    names = "(inner_params, outer_params, batch{})".format(", model_state, rng" if stateful else "")
    fix = f"write it as {name}{names}"
    if not stateful and takes(5):
        fix = "if it takes the model's state and a key, set Problem(..., stateful=True)"
    elif stateful and takes(3):
        fix += ", or leave out stateful=True"
    return f"{name}{signature} is called as {name}{names}: {fix}"


def _none_given(error: Exception, name: str, batch: Any, model_state: Any) -> Exception | None:
    side = name.replace("_loss", "")
    fixes = []
    if batch is None:
        fixes.append(f"batch=None: hand over its minibatch, bf.Batch({side}=...)")
    if model_state is None:
        fixes.append(
            f"model_state=None: pass model_state=... {_STATE}, or a TrainState that has it"
        )
    if not fixes:
        return None
    first = str(error).split("\n")[0].rstrip(". ")
    return TypeError(f"{name}: {first}; it was given {'; and '.join(fixes)}")


def _missing_key(error: KeyError, name: str, batch: Any, model_state: Any) -> str:
    key = error.args[0] if error.args else None
    if not isinstance(key, str):
        return ""
    if isinstance(model_state, Mapping) and _read(error, model_state):
        given = ", ".join(map(repr, model_state)) or "nothing"
        return (
            f'{name} reads model_state["{key}"], but was given {given}: pass '
            f"solver.init(..., model_state=...) {_STATE}"
        )
    if not isinstance(batch, Mapping) or key in batch:
        return ""
    return (
        f'{name} reads batch["{key}"], but its minibatch has {sorted(map(str, batch))}: add the '
        f"entry to the data of {name.replace('_loss', '')} minibatches, or batch.get where it may "
        "lack"
    )


def _read(error: KeyError, mapping: Mapping) -> bool:
    """Whether the line that raised the error reads this mapping, as far as its text tells."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    frame = trace.tb_frame
    line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno)
    names = [name for name, value in frame.f_locals.items() if value is mapping]
    return any(f"{name}[" in line for name in names)


def _rows_expected(error: Exception, x: Any, batch: Any) -> Exception | None:
    if not (isinstance(batch, Mapping) and "index" in batch and jnp.ndim(batch["index"]) == 1):
        return None
    examples = len(batch["index"])
    for path, leaf in jax.tree.leaves_with_path(x):
        if jnp.ndim(leaf) and jnp.shape(leaf)[0] != examples:
            first = str(error).split("\n")[0].rstrip(".")
            return ValueError(
                f"inner_loss: {first}; outer_params{jax.tree_util.keystr(path)} has "
                f"{jnp.shape(leaf)[0]} rows and the minibatch {examples} examples: for a row of it "
                "with each training example, set Problem(..., per_sample=True)"
            )
    return None
