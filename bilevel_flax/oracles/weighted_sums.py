"""Losses that are (sum, weight) pairs: their mean is exact however a minibatch is cut.

    G(minibatch) = Σ_p S_p / Σ_p W_p        S_p, W_p the pair of part p

A mean over tokens is no mean of means: parts (microbatches, devices, blocks of a cheap step) with
fewer real tokens count for less. A loss that says its weight says how much, whatever the masks in
the minibatch are called.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bilevel_flax import per_sample as rows
from bilevel_flax.base import Problem, PyTree
from bilevel_flax.base.condition import Condition, is_condition
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.wrapped_loss import WrappedLoss
from bilevel_flax.minibatches import MASKS, counted, entries, example_mask, name_of, repeat_real
from bilevel_flax.oracles import losses
from bilevel_flax.oracles.wrapped_loss import SIDES
from bilevel_flax.tree import depends_on

if TYPE_CHECKING:
    from bilevel_flax.oracles.growth import Growth


class NoMeanError(ValueError):
    """A minibatch is to be cut into parts, and its loss is not their weighted mean."""


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedSum(WrappedLoss):
    """A loss that returns (sum, weight); called, it is sum / weight."""

    def __call__(self, *args: Any) -> Any:
        """The mean; a minibatch of weight 0 gives the sum."""
        (total, weight), *aux = self._pair(*args)
        # A count has more digits than bfloat16.
        wide = jnp.promote_types(jnp.result_type(total), jnp.float32)
        mean = total.astype(wide) / jnp.where(weight > 0, weight, 1).astype(wide)
        return (mean, *aux) if aux else mean

    def weight(self, *args: Any) -> Any:
        """W of a minibatch, in float32 at least."""
        (_, weight), *_ = self._pair(*args)
        return _wide(weight)

    def _pair(self, *args: Any) -> tuple:
        out = self.loss(*args)
        pair = out[0] if len(args) > 3 and isinstance(out, tuple) else out
        if not (isinstance(pair, tuple) and len(pair) == 2 and not any(map(jnp.ndim, pair))):
            raise TypeError(
                "a loss under bf.oracles.weighted_sums must return a pair of scalars "
                "(sum, weight), or ((sum, weight), bf.Aux(...)) with stateful=True, "
                f"got {_shown(pair)}"
            )
        pair = tuple(map(jnp.asarray, pair))
        return (pair, *out[1:]) if len(args) > 3 else (pair,)


def weighted_sums(problem: Problem) -> Problem:
    """Takes losses that return (sum, weight): of a batch's tokens and their number, say.

    Where a minibatch is cut into parts (`microbatched`, `sharding.data_parallel`, the cheap steps
    of `auto`) each counts by its weight, so that the numbers are those of the whole. No mask needs
    a name that the library knows, and weights are never rounded by `mixed_precision`.

    Args:
        problem: its losses return `(sum, weight)`, two scalars; if it is stateful
            `((sum, weight), Aux(...))`. Where a minibatch is cut, the weight must be a function of
            the minibatch alone, and add up over its parts.

    Raises:
        TypeError: the inner problem is a condition; at trace time, a loss returns something else.
        ValueError: at trace time, a minibatch is cut and the weight depends on z, x, the model's
            state or the key.

    Example:
        >>> import jax.numpy as jnp, bilevel_flax as bf
        >>> def loss(z, x, batch):
        ...     losses = (z - batch["tokens"]) ** 2
        ...     return jnp.sum(losses * batch["visible"]), jnp.sum(batch["visible"])
        >>> problem = bf.oracles.weighted_sums(bf.Problem(loss, loss))
        >>> batch = {"tokens": jnp.array([[1.0, 3.0]]), "visible": jnp.array([[1, 0]])}
        >>> float(problem.inner_loss(0.0, 0.0, batch))
        1.0
    """
    check_problem(problem)

    def wrapped(loss):
        if isinstance(loss, WeightedSum):
            return loss
        if isinstance(loss, Condition):
            raise TypeError(
                "weighted_sums takes losses, and the inner problem is a condition: let it return "
                "its mean over the minibatch"
            )
        if isinstance(loss, WrappedLoss):
            return dataclasses.replace(loss, loss=wrapped(loss.loss))
        return WeightedSum(loss)

    return dataclasses.replace(problem, **{name: wrapped(getattr(problem, name)) for name in SIDES})


def weighted_sum(loss: Any) -> WeightedSum | None:
    """What gives a loss its weight, whatever else is wrapped around it; None: nothing does."""
    while isinstance(loss, WrappedLoss):
        if isinstance(loss, WeightedSum):
            return loss
        loss = loss.loss
    return None


def amount(
    problem: Problem,
    side: str,
    point: tuple[PyTree, PyTree],
    batch: PyTree,
    context: tuple,
    splits: str,
) -> Any:
    """How much a minibatch or a part of it counts beside others; None: as its length.

    Args:
        problem: the problem.
        side: "inner_loss" or "outer_loss".
        point: (z, x).
        batch: the minibatch or a part of it.
        context: (model_state, rng).
        splits: what cuts, for the errors.

    Returns:
        A scalar: the loss's own weight, or else the sum of `minibatches.example_mask`.

    Raises:
        NoMeanError: the loss is no mean, or has no weight and is one over something else than
            examples.
        ValueError: the weight depends on more than the minibatch; or as `example_mask`.
    """
    pair = weighted_sum(getattr(problem, side))
    mask = example_mask(batch, splits) if pair is None else None
    if not is_condition(getattr(problem, side)):
        counts = pair is not None or "example_mask" in entries(batch)
        found = loss_growth(problem, side, point, batch, context)
        _refuse_other_means(found, side, splits, counts)
    if pair is None:
        return None if mask is None else jnp.sum(counted(mask))
    z, x = point
    if side == "inner_loss":
        x = rows.gather(problem.per_sample, x, batch)
    examples = repeat_real(batch)

    def weight(z, x, context):
        return pair.weight(z, x, examples, *(context if problem.stateful else ()))

    if any(depends_on(weight, z, x, context)):
        raise ValueError(
            f"the weight of {side} depends on more than the minibatch, so {splits} cannot tell how "
            "much each part counts: let it count what is in the minibatch, (sum of weighted "
            "losses, number of tokens)"
        )
    return weight(z, x, context)


def loss_growth(
    problem: Problem,
    side: str,
    point: tuple[PyTree, PyTree],
    batch: PyTree,
    context: tuple,
) -> Growth:
    """`growth` of a loss in its minibatch; arguments as of `amount`. Nothing is run."""
    leaves, treedef = jax.tree.flatten_with_path(batch)
    is_data = [name_of(path) not in (*MASKS, "index") for path, leaf in leaves if jnp.ndim(leaf)]
    wrap = losses.inner if side == "inner_loss" else losses.outer

    def loss(arrays, point):
        values = iter(arrays)
        filled = [next(values) if jnp.ndim(leaf) else leaf for _, leaf in leaves]
        (z, x), (model_state, rng) = point, context
        value, z_split, x_split, *_ = wrap(
            problem, z, x, treedef.unflatten(filled), model_state, rng
        )
        return value(z_split.leaves, x_split.leaves)[0]

    arrays = [leaf for _, leaf in leaves if jnp.ndim(leaf)]
    twice = [
        jax.ShapeDtypeStruct((2 * shape[0], *shape[1:]), jnp.result_type(leaf))
        for leaf, shape in ((leaf, jnp.shape(leaf)) for leaf in arrays)
    ]
    from bilevel_flax.oracles.growth import growth  # late: few minibatches are cut

    return growth(loss, arrays, twice, point, is_data)


def _refuse_other_means(found: Growth, side: str, splits: str, counts: bool) -> None:
    """Raises where the parts' means are not the whole; `counts`: it is said how parts count."""
    if found.power:
        raise NoMeanError(
            f"{side} is no mean over the minibatch's examples: of twice as many a term is "
            f"{2.0**found.power:.3g} times as large, so {splits} would change it; return the mean, "
            "or (sum, weight) under bf.oracles.weighted_sums"
        )
    if found.divides_by_data and not counts:
        raise NoMeanError(
            f"{side} divides by what it counts in the minibatch (tokens, weights), so {splits} "
            "cannot tell how much each part counts: return (sum, weight) under "
            'bf.oracles.weighted_sums, or add batch["example_mask"], how much each example counts'
        )


def _wide(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.result_type(float)))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_shown(part) for part in value) + ")"
    return f"shape {jnp.shape(value)}" if hasattr(value, "shape") else type(value).__name__
