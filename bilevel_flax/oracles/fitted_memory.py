"""Which activations a step keeps, and in how many parts it sees a minibatch: found by compiling it.

Plain training with rematerialised blocks takes a forward pass twice and backprop, 4 in units of a
forward pass. `jvp` of that takes the tangent's forward pass, of two products for each of the
primal's, twice as well: 12 units, and 4 for F, 4 plain steps in all. Without recomputation it is
9 + 3, 3 plain steps, but with all activations and their tangents in memory. Half the minibatch at
a time is half of these, for no operations. So recomputation, which pays for plain training, is
rarely the cheapest way to the same memory here, and the two are weighed against each other.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxpr_as_fun

from bilevel_flax.base import Batch, Problem, TrainState, Variables
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.solver import complete_by_state
from bilevel_flax.oracles import flops
from bilevel_flax.oracles.evaluate import evaluate_all
from bilevel_flax.oracles.gradients import (
    inner_value_and_grad,
)
from bilevel_flax.oracles.jaxprs import rewritten
from bilevel_flax.oracles.microbatches import in_parts
from bilevel_flax.oracles.wrapped_loss import wrap_losses
from bilevel_flax.oracles.wrappers import microbatched

# What rematerialised blocks keep, most first; "": what the network's author chose.
KEPT = ("everything_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "")
_CLOSE = 1.05  # of the fewest operations: fewer parts are worth as much


class Fit(NamedTuple):
    """What `fit_memory` found.

    Attributes:
        problem: computed in this way.
        kept: what its rematerialised blocks keep, a name in `jax.checkpoint_policies`; "": what
            they kept before.
        microbatches: parts of a minibatch.
        temporary_bytes: of the compiled oracles.
        flops: of one evaluation of all oracles.
        budget: bytes.
        plain_flops: of one gradient of G, as the network was given.

    Example:
        >>> import bilevel_flax as bf
        >>> loss = lambda z, x, batch: ((z - x) ** 2).mean()
        >>> fit = bf.oracles.Fit(bf.Problem(loss, loss), "", 2, 2**20, 300.0, 2**21, 100.0)
        >>> print(fit.message)
        blocks keep what they kept, 2 microbatches: 3.00 times a gradient's operations, ...
    """

    problem: Problem
    kept: str
    microbatches: int
    temporary_bytes: int
    flops: float
    budget: int
    plain_flops: float

    @property
    def message(self) -> str:
        """One line."""
        return (
            f"blocks keep {self.kept or 'what they kept'}, {self.microbatches} microbatches: "
            f"{self.flops / self.plain_flops:.2f} times a gradient's operations, "
            f"{self.temporary_bytes / 2**20:.1f} MiB of temporaries (of {self.budget / 2**20:.1f})"
        )


def keep(problem: Problem, policy: str) -> Problem:
    """Rematerialised blocks (`jax.checkpoint`, `nn.remat`) in the losses keep what a policy says.

    Args:
        problem: the problem.
        policy: a name in `jax.checkpoint_policies`: "everything_saveable" (nothing is computed
            twice), "dots_saveable" (the outputs of matrix products are not),
            "dots_with_no_batch_dims_saveable" (those of attention are), "nothing_saveable".

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> block = jax.checkpoint(lambda z: jnp.sin(z @ z))
        >>> loss = lambda z, x, batch: ((block(z) - x) ** 2).mean()
        >>> problem = keep(bf.Problem(loss, loss), "dots_saveable")
    """
    chosen = getattr(jax.checkpoint_policies, policy)

    def change(eqn):
        blocks = "policy" in eqn.params and "jaxpr" in eqn.params
        return eqn.replace(params={**eqn.params, "policy": chosen}) if blocks else eqn

    def transform(loss: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args):
            leaves, tree = jax.tree.flatten(args)
            of_leaves = lambda *leaves: loss(*tree.unflatten(leaves))
            closed, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
            out = jaxpr_as_fun(rewritten(closed, change))(*leaves)
            return jax.tree.unflatten(jax.tree.structure(shapes), out)

        return kept

    return wrap_losses(problem, transform)


def fit_memory(
    problem: Problem,
    point: TrainState | Variables,
    batch: Batch,
    *,
    factor: float = 1.5,
    budget: int | None = None,
    model_state: Any = None,
    rng: jax.Array | None = None,
) -> Fit:
    """The cheapest way to a step's oracles within the memory of plain training.

    For each of `KEPT`, the fewest microbatches with which the compiled program's temporaries are
    within the budget; among these what takes the fewest operations (within 5 %: the fewest parts).
    Compiles one program for each that is tried, about ten; nothing is run.

    Args:
        problem: the problem, its network's blocks rematerialised; not microbatched. Losses must be
            what `microbatched` takes (means over examples; BatchNorm would see parts).
        point: a `TrainState`, or `Variables`; arrays or their shapes.
        batch: a pair of minibatches, arrays or their shapes.
        factor: the budget is so many times the temporaries of one compiled gradient of G, as the
            problem is given.
        budget: bytes, instead.
        model_state: of a stateful problem; None: the state's.
        rng: its key; None: the state's.

    Raises:
        ValueError: nothing is within the budget; names the least that there is. Or the problem is
            microbatched already, or `factor` is no positive number.
        TypeError: no problem, point or pair of minibatches.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> block = jax.checkpoint(lambda z, a: jnp.sin(a @ z))
        >>> loss = lambda z, x, a: (block(z, block(z, a)) ** 2).mean() + x * (z**2).sum()
        >>> problem, a = bf.Problem(loss, loss), jnp.ones((8, 4))
        >>> point = bf.Variables(jnp.ones((4, 4)), jnp.zeros((4, 4)), jnp.ones(()))
        >>> fit = bf.oracles.fit_memory(problem, point, bf.Batch(a, a), factor=3.0)
        >>> fit.temporary_bytes <= fit.budget, fit.flops < 4 * fit.plain_flops
        (True, True)
    """
    check_problem(problem)
    if not isinstance(batch, Batch) or batch.inner is None or batch.outer is None:
        raise TypeError(
            f"batch is a {type(batch).__name__}, but must be a pair, bf.Batch(inner, outer)"
        )
    if in_parts(problem.inner_loss) or in_parts(problem.outer_loss):
        raise ValueError("problem is microbatched already: hand fit_memory what it was made from")
    if not (isinstance(factor, numbers.Real) and factor > 0):
        raise ValueError(f"factor={factor!r} must be a positive number, e.g. 1.5")
    point, model_state, rng = complete_by_state(point, model_state, rng)
    context = (point, batch, model_state, rng)
    plain = jax.jit(
        lambda point, batch, state, rng: inner_value_and_grad(
            problem, point.inner, point.outer, batch.inner, state, rng
        )
    ).trace(*context)
    if budget is None:
        budget = int(factor * _temporaries(plain))

    def attempt(kept: str, parts: int) -> Fit:
        changed = microbatched(keep(problem, kept) if kept else problem, parts)
        traced = jax.jit(
            lambda point, batch, state, rng: evaluate_all(changed, point, batch, state, (rng, rng))
        ).trace(*context)
        work = flops.of(traced.jaxpr), budget, flops.of(plain.jaxpr)
        return Fit(changed, kept, parts, _temporaries(traced), *work)

    tried = [found for kept in KEPT for found in _fewest(kept, attempt, _divisors(batch), budget)]
    fitting = [found for found in tried if found.temporary_bytes <= budget]
    if not fitting:
        least = min(tried, key=lambda found: found.temporary_bytes)
        raise ValueError(
            f"no way to the step's oracles takes {budget} bytes of temporaries or less; the least "
            f"is {least.message}: give more, or take smaller minibatches"
        )
    most = _CLOSE * min(found.flops for found in fitting)
    return min(
        (found for found in fitting if found.flops <= most),
        key=lambda found: (found.microbatches, found.flops),
    )


def _fewest(kept: str, attempt: Callable, divisors: list[int], budget: int) -> list[Fit]:
    """What was tried, up to the first number of parts that is within the budget."""
    tried: list[Fit] = []
    for parts in divisors:
        # Memory falls with the parts at most in proportion: others are not worth a compilation.
        hopeless = tried and tried[-1].temporary_bytes * tried[-1].microbatches > budget * parts
        if hopeless and parts != divisors[-1]:
            continue
        tried.append(attempt(kept, parts))
        if tried[-1].temporary_bytes <= budget:
            break
    return tried


def _divisors(batch: Batch) -> list[int]:
    """Powers of two that divide the leading lengths of both minibatches."""
    leaves = [leaf for leaf in jax.tree.leaves((batch.inner, batch.outer)) if leaf.shape]
    divisors = [1]
    while leaves and all(leaf.shape[0] % (2 * divisors[-1]) == 0 for leaf in leaves):
        divisors.append(2 * divisors[-1])
    return divisors


def _temporaries(traced: Any) -> int:
    return int(traced.lower().compile().memory_analysis().temp_size_in_bytes)
