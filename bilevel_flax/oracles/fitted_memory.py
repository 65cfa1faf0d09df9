"""Which activations a step keeps, and in how many parts it sees a minibatch: found by compiling it.

Plain training with rematerialised blocks takes a forward pass twice and backprop, 4 in units of a
forward pass. `jvp` of that takes the tangent's forward pass, of two products for each of the
primal's, twice as well: 12 units, and 4 for F, 4 plain steps in all. Without recomputation it is
9 + 3, 3 plain steps, but with all activations and their tangents in memory. Half the minibatch at
a time is half of these, for no operations. So recomputation, which pays for plain training, is
rarely the cheapest way to the same memory here, and the two are weighed against each other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel_flax.base import Batch, Problem, TrainState, Variables
from bilevel_flax.base.problem import check_problem
from bilevel_flax.base.solver import complete_by_state
from bilevel_flax.oracles import flops
from bilevel_flax.oracles.evaluate import evaluate_all
from bilevel_flax.oracles.gradients import inner_value_and_grad
from bilevel_flax.oracles.microbatches import in_parts
from bilevel_flax.oracles.rematerialisation import POLICIES, keep
from bilevel_flax.oracles.wrapped_loss import SIDES
from bilevel_flax.oracles.wrappers import microbatched

# What rematerialised blocks keep, most first; "": what the network's author chose.
KEPT = (*POLICIES[:-1], "")
_CLOSE = 1.05  # of the least time or the fewest operations: fewer parts are worth as much
_ROUNDS = 4  # of taking times in turns; the first warms up


class Fit(NamedTuple):
    """What `fit_memory` found.

    Attributes:
        problem: computed in this way.
        kept: what rematerialised blocks keep in G's three quantities, a name in
            `jax.checkpoint_policies`; "": what they kept before.
        microbatches: parts of G's minibatch.
        temporary_bytes: of the compiled oracles.
        flops: of one evaluation of all oracles.
        budget: bytes.
        plain_flops: of one gradient of G, as the network was given.
        outer_kept: as `kept`, of F.
        outer_microbatches: parts of F's minibatch.
        plain_steps: seconds of an evaluation of all oracles over those of a gradient of G as the
            network was given; None: no times were taken.

    Example:
        >>> import bilevel_flax as bf
        >>> loss = lambda z, x, batch: ((z - x) ** 2).mean()
        >>> fit = bf.oracles.Fit(bf.Problem(loss, loss), "", 2, 2**20, 300.0, 2**21, 100.0)
        >>> print(fit.message)
        G's blocks keep what they kept, in 2 parts; F's what they kept, in 1: 3.00 times ...
    """

    problem: Problem
    kept: str
    microbatches: int
    temporary_bytes: int
    flops: float
    budget: int
    plain_flops: float
    outer_kept: str = ""
    outer_microbatches: int = 1
    plain_steps: float | None = None

    @property
    def message(self) -> str:
        """One line."""
        takes = "" if self.plain_steps is None else f", {self.plain_steps:.2f} times its time"
        parts = f"{self.microbatches} part{'s' * (self.microbatches > 1)}"
        return (
            f"G's blocks keep {self.kept or 'what they kept'}, in {parts}; F's "
            f"{self.outer_kept or 'what they kept'}, in {self.outer_microbatches}: "
            f"{self.flops / self.plain_flops:.2f} times a gradient's operations{takes}, "
            f"{self.temporary_bytes / 2**20:.3g} MiB of temporaries (of {self.budget / 2**20:.3g})"
        )


class _Program(NamedTuple):
    """Some of the oracles, compiled."""

    flops: float
    temporary_bytes: int
    run: Callable[[], Any]


class _Way(NamedTuple):
    """One side's oracles with a choice of what is kept and in how many parts."""

    kept: str
    parts: int
    program: _Program


def fit_memory(
    problem: Problem,
    point: TrainState | Variables,
    batch: Batch,
    *,
    factor: float = 1.5,
    budget: int | None = None,
    timed: bool | None = None,
    model_state: Any = None,
    rng: jax.Array | None = None,
) -> Fit:
    """The cheapest way to a step's oracles within the memory of plain training.

    For G's three quantities and for F's gradients, each with all of `KEPT`: the fewest microbatches
    with which the compiled program's temporaries are within the budget. Among these what takes the
    least time, or, where no times are taken, the fewest operations (within 5 %: the fewest parts).
    Compiles about fifteen programs.

    Args:
        problem: the problem, its network's blocks rematerialised; not microbatched. Losses must be
            what `microbatched` takes (means over examples; BatchNorm would see parts).
        point: a `TrainState`, or `Variables`; arrays or their shapes.
        batch: a pair of minibatches, arrays or their shapes.
        factor: the budget is so many times the temporaries of one compiled gradient of G, as the
            problem is given.
        budget: bytes, instead.
        timed: whether the programs that fit are run, four times each in turns: True, or False for a
            choice that is the same wherever it is made. None: where point and batch are arrays, and
            this process is the only one.
        model_state: of a stateful problem; None: the state's.
        rng: its key; None: the state's.

    Raises:
        ValueError: nothing is within the budget; names the least that there is. Or the problem is
            microbatched already, `factor` or `budget` is no positive number, or `timed=True` comes
            without arrays.
        TypeError: no problem, point or pair of minibatches.

    Example:
        >>> import jax, jax.numpy as jnp, bilevel_flax as bf
        >>> block = jax.checkpoint(lambda z, a: jnp.sin(a @ z))
        >>> loss = lambda z, x, a: (block(z, block(z, a)) ** 2).mean() + x * (z**2).sum()
        >>> problem, a = bf.Problem(loss, loss), jnp.ones((8, 4))
        >>> point = bf.Variables(jnp.ones((4, 4)), jnp.zeros((4, 4)), jnp.ones(()))
        >>> fit = bf.oracles.fit_memory(problem, point, bf.Batch(a, a), factor=9.0, timed=False)
        >>> fit.temporary_bytes <= fit.budget, fit.flops < 4 * fit.plain_flops
        (True, True)
    """
    _check(problem, batch, factor, budget)
    point, model_state, rng = complete_by_state(point, model_state, rng)
    context = (point, batch, model_state, rng)
    shapes = [leaf for leaf in jax.tree.leaves(context) if isinstance(leaf, jax.ShapeDtypeStruct)]
    if timed and shapes:
        raise ValueError(f"timed=True needs arrays to run on, but was handed {shapes[0]}")
    timed = not shapes and jax.process_count() == 1 if timed is None else timed

    def gradient(point, batch, model_state, rng):
        z, _, x = point
        return inner_value_and_grad(problem, z, x, batch.inner, model_state, rng)

    plain = _compiled(gradient, context)
    budget = int(factor * plain.temporary_bytes) if budget is None else budget

    def attempt(side: str, kept: str, parts: int) -> _Way:
        half = {"inner_loss": {"outer": None}, "outer_loss": {"inner": None}}[side]
        changed = _changed(problem, kept, parts)
        return _Way(kept, parts, _oracles(changed, (point, batch._replace(**half), *context[2:])))

    tried = {
        side: [
            way
            for kept in KEPT
            for way in _fewest(functools.partial(attempt, side, kept), _divisors(half), budget)
        ]
        for side, half in (("inner_loss", batch.inner), ("outer_loss", batch.outer))
    }

    def fitted(inner: _Way, outer: _Way) -> tuple[Fit, _Program]:
        half, other = (_changed(problem, way.kept, way.parts) for way in (inner, outer))
        both = dataclasses.replace(half, outer_loss=other.outer_loss)
        program = _oracles(both, context)
        found = Fit(
            both,
            inner.kept,
            inner.parts,
            program.temporary_bytes,
            program.flops,
            budget,
            plain.flops,
            outer.kept,
            outer.parts,
        )
        return found, program

    fitting = [
        [way for way in tried[side] if way.program.temporary_bytes <= budget] for side in SIDES
    ]
    inner, outer = (_cheapest_first(ways, timed) for ways in fitting)
    # Two that are within the budget each can be above it together, where XLA lets them overlap.
    for pair in sorted(
        itertools.product(enumerate(inner), enumerate(outer)),
        key=lambda pair: pair[0][0] + pair[1][0],
    ):
        found, program = fitted(*(way for _, way in pair))
        if found.temporary_bytes <= budget:
            break
    else:
        least = (min(tried[side], key=lambda way: way.program.temporary_bytes) for side in SIDES)
        raise ValueError(
            f"no way to the step's oracles takes {budget} bytes of temporaries or less; the least "
            f"is {fitted(*least)[0].message}: give more, or take smaller minibatches"
        )
    if timed:
        one, all_of_them = _seconds([plain.run, program.run])
        found = found._replace(plain_steps=all_of_them / one)
    return found


def _check(problem: Problem, batch: Batch, factor: float, budget: int | None) -> None:
    check_problem(problem)
    if not isinstance(batch, Batch) or batch.inner is None or batch.outer is None:
        raise TypeError(
            f"batch is a {type(batch).__name__}, but must be a pair, bf.Batch(inner, outer)"
        )
    if in_parts(problem.inner_loss) or in_parts(problem.outer_loss):
        raise ValueError("problem is microbatched already: hand fit_memory what it was made from")
    if not (isinstance(factor, numbers.Real) and factor > 0):
        raise ValueError(f"factor={factor!r} must be a positive number, e.g. 1.5")
    if not (budget is None or (isinstance(budget, numbers.Real) and budget > 0)):
        raise ValueError(f"budget={budget!r} must be a number of bytes, e.g. 2**30")


def _changed(problem: Problem, kept: str, parts: int) -> Problem:
    return microbatched(keep(problem, kept) if kept else problem, parts)


def _oracles(problem: Problem, context: tuple) -> _Program:
    def oracles(point, batch, model_state, rng):
        return evaluate_all(problem, point, batch, model_state, (rng, rng))

    return _compiled(oracles, context)


def _compiled(function: Callable[..., Any], context: tuple) -> _Program:
    traced = jax.jit(function).trace(*context)
    program: Any = traced.lower().compile()
    temporaries = program.memory_analysis().temp_size_in_bytes
    return _Program(flops.of(traced.jaxpr), temporaries, functools.partial(program, *context))


def _fewest(attempt: Callable[[int], _Way], divisors: list[int], budget: int) -> list[_Way]:
    """What was tried, up to the first number of parts that is within the budget."""
    tried: list[_Way] = []
    for parts in divisors:
        # Memory falls with the parts at most in proportion: others are not worth a compilation.
        hopeless = tried and tried[-1].program.temporary_bytes * tried[-1].parts > budget * parts
        if hopeless and parts != divisors[-1]:
            continue
        tried.append(attempt(parts))
        if tried[-1].program.temporary_bytes <= budget:
            break
    return tried


def _divisors(batch: Any) -> list[int]:
    """Powers of two that divide the leading lengths of a minibatch."""
    leaves = [leaf for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)]
    divisors = [1]
    while leaves and all(leaf.shape[0] % (2 * divisors[-1]) == 0 for leaf in leaves):
        divisors.append(2 * divisors[-1])
    return divisors


def _cheapest_first(ways: list[_Way], timed: bool) -> list[_Way]:
    """By times or by operations; of what is close to the least, the fewest parts first."""
    costs = [way.program.flops for way in ways]
    if timed:
        costs = _seconds([way.program.run for way in ways])
    close = _CLOSE * min(costs, default=0.0)
    keys = [(max(cost, close), way.parts, cost) for cost, way in zip(costs, ways, strict=True)]
    return [ways[i] for i in sorted(range(len(ways)), key=lambda i: keys[i])]


def _seconds(programs: list[Callable[[], Any]]) -> list[float]:
    """The least of some rounds in turns."""
    least = [float("inf")] * len(programs)
    for _ in range(_ROUNDS):
        for i, program in enumerate(programs):
            began = time.perf_counter()
            jax.block_until_ready(program())
            least[i] = min(least[i], time.perf_counter() - began)
    return least
