"""Several goals at once: F of several validation losses, each on data of its own.

    F = Σ_k w_k max(F_k, floor_k)        or        F = τ log Σ_k w_k exp(F_k / τ)

∇₁F and so D_v are sums over the goals (the second with weights of the moment), so that ONE adjoint
serves them all, however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel_flax.base import Aux, PyTree
from bilevel_flax.checks import UserError, check_number
from bilevel_flax.minibatches import example_mask


class Goals:
    """What `goals` returns: an outer loss.

    Attributes:
        is_mean: whether it is a mean over examples, so that minibatches may be cut into parts.
    """

    def __init__(self, call: Callable[..., Any], is_mean: bool):
        self._call, self.is_mean = call, is_mean

    def __call__(self, *args: Any) -> Any:
        """F, or `(F, Aux)` where the goals' losses are stateful."""
        return self._call(*args)


def goals(
    losses: Mapping[str, Callable[..., Any]],
    weights: Mapping[str, float] | None = None,
    *,
    floors: Mapping[str, float] | None = None,
    temperature: float | None = None,
    stateful: bool = False,
) -> Goals:
    """An `outer_loss` made of several; each is handed `batch[name]`, a minibatch of its own.

    Args:
        losses: name -> `loss(inner_params, outer_params, minibatch) -> scalar`, or a stateful one.
        weights: name -> w_k > 0, made to sum to 1; None: equal ones.
        floors: name -> a loss that is good enough: below it the goal no longer pulls.
        temperature: τ > 0: the soft worst case in place of the sum, the harder the smaller τ.
        stateful: the losses are those of a stateful problem. Each goal's loss is then found in
            `info.metrics["outer_NAME"]`; metrics of their own are named `outer_NAME_METRIC`.

    Returns:
        The loss. With `floors` or a `temperature` it is no mean over examples, and
        `oracles.microbatched` refuses it.

    Raises:
        UserError: no goals, names that differ, weights or a temperature that are not positive,
            floors that are no numbers; at trace time a batch without one of the names, or padding.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> error = lambda z, x, batch: jnp.mean((z - batch) ** 2)
        >>> loss = bf.outer.goals({"near": error, "far": error}, {"near": 3, "far": 1})
        >>> float(loss(0.0, None, {"near": jnp.ones(2), "far": jnp.full(2, 2.0)}))
        1.75
    """
    for name, given in (("losses", losses), ("weights", weights), ("floors", floors)):
        if not isinstance(given, Mapping | None):
            raise UserError(f"{name}={given!r:.60} must be a mapping by the goals' names")
    if not losses:
        raise UserError("losses={}: name at least one goal, {'name': loss}")
    for name, loss in losses.items():
        if not callable(loss):
            raise UserError(f"losses[{name!r}] must be a function, got {loss!r:.60}")
    for name, given in (("weights", weights), ("floors", floors)):
        unknown = sorted(set(given or {}) - set(losses))
        missing = sorted(set(losses) - set(given)) if name == "weights" and given else []
        if unknown or missing:
            raise UserError(
                f"{name} has {sorted(given or {})}, but the goals are {sorted(losses)}: use the "
                "same names"
            )
    shares = dict.fromkeys(losses, 1.0) if weights is None else dict(weights)
    for name, weight in shares.items():
        check_number(f"weights[{name!r}]", weight, 0.0)
    for name, floor in (floors or {}).items():
        check_number(f"floors[{name!r}]", floor)
    if temperature is not None:
        check_number("temperature", temperature, 0.0)
    total = math.fsum(shares.values())

    def evaluate(z: PyTree, x: PyTree, batch: Any, *context: Any) -> Any:
        values, metrics = {}, {}
        for name, loss in losses.items():
            out = loss(z, x, _minibatch(batch, name), *context)
            values[name], aux = out if stateful else (out, Aux())
            metrics |= {f"{name}_{key}": value for key, value in aux.metrics.items()}
        metrics |= values
        raised = {
            name: jnp.maximum(value, floors[name]) if floors and name in floors else value
            for name, value in values.items()
        }
        if temperature is None:
            whole = sum(shares[name] / total * value for name, value in raised.items())
        else:
            logs = [jnp.log(shares[name] / total) + v / temperature for name, v in raised.items()]
            whole = temperature * jax.nn.logsumexp(jnp.stack(logs))
        return (whole, Aux(context[0], metrics)) if stateful else whole

    return Goals(evaluate, is_mean=not floors and temperature is None)


def _minibatch(batch: Any, name: str) -> Any:
    if not isinstance(batch, Mapping) or name not in batch:
        entries = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise UserError(
            f"the outer batch has {entries}, but the goal {name!r} needs a minibatch of that name: "
            "batch.outer = {name: minibatch, ...}"
        )
    if example_mask(batch[name]) is not None:
        raise UserError(
            f"the minibatch of the goal {name!r} is padded (it has a mask): goals take full "
            "minibatches, for each of them counts by its weight and not by its examples"
        )
    return batch[name]
