"""How long a bilevel step takes beside a plain Optax step: both compiled, taking turns."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax import oracles
from bilevel_flax import per_sample as rows
from bilevel_flax.base import Problem, PyTree, TrainState
from bilevel_flax.train.device_feed import minibatch
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.tree import filter_inexact

_FEWEST_STEPS = 8  # of one turn: `auto`'s cheap setting does its work in every eighth
_MOST_STEPS = 200


def over_plain(
    loop: StepRunner,
    problem: Problem,
    inner: optax.GradientTransformation,
    state: TrainState,
    *,
    rounds: int = 5,
    seconds: float = 0.2,
) -> tuple[float, float]:
    """Seconds of a step of the solver, and of plain training, each the best of some turns.

    Plain training minimises the same inner loss with the same optimiser on the same minibatches,
    in a compiled loop too, with x standing still. Both run on copies: nothing of the run moves.

    Args:
        loop: the run's; compiled if it is not yet.
        problem: the run's losses.
        inner: z's optimiser.
        state: where the run stands; it is not used up.
        rounds: turns of each.
        seconds: that a turn should take; 8 steps at least.

    Returns:
        (bilevel, plain) seconds a step. NaN where the solver's step is not finite at `state`.
    """
    start = int(state.step)
    plain = _Plain(problem, inner, state)
    _run_copy(loop, state, 1)  # compiles; this run is not counted
    pace = _run_copy(loop, state, 4)
    if not np.isfinite(pace):
        return float("nan"), float("nan")
    steps = int(np.clip(seconds / max(pace, 1e-9), _FEWEST_STEPS, _MOST_STEPS))
    args = loop.arguments(start, start + steps)
    plain(args, steps)
    best = {"bilevel": np.inf, "plain": np.inf}
    for _ in range(rounds):
        best["bilevel"] = min(best["bilevel"], _run_copy(loop, state, steps))
        best["plain"] = min(best["plain"], plain(args, steps) / steps)
    return best["bilevel"], best["plain"]


def _run_copy(loop: StepRunner, state: TrainState, steps: int) -> float:
    """Seconds of an update, of `steps` of them on a copy of the state; NaN: one was not finite."""
    start = step = int(state.step)
    state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    loop.compile(state, start)
    began = loop.seconds
    while step < start + steps:
        state, info = loop.run(state, step, start + steps)
        if not all(side[-1] for side in info.finite):
            return float("nan")
        step += len(info.inner_loss)
    return (loop.seconds - began) / steps


class _Plain:
    """Ordinary training in a compiled loop."""

    def __init__(
        self, problem: Problem, inner: optax.GradientTransformation, state: TrainState
    ) -> None:
        transform = optax.with_extra_args_support(inner)
        z, _, x = state.variables
        opt_state = transform.init(filter_inexact(z))
        if jax.tree.structure(opt_state) == jax.tree.structure(state.inner_opt_state):
            opt_state = state.inner_opt_state  # the run's: its schedule and statistics
        self._start: PyTree = (z, opt_state, state.model_state, jnp.float32(0.0))

        def many(carry, x, key, batches, positions, count):
            def step(i, carry):
                z, opt_state, model_state, total = carry
                at = positions[i]
                batch = minibatch(batches, at if at.ndim == 0 else at[0])
                rng = jax.random.fold_in(key, i) if problem.stateful else None
                (loss, aux), grad = oracles.inner_value_and_grad(
                    problem, z, x, batch, model_state, rng
                )
                updates, opt_state = transform.update(
                    filter_inexact(grad), opt_state, filter_inexact(z), outer_params=x
                )
                model_state = aux.model_state if problem.stateful else model_state
                z = rows.apply_updates(z, updates)
                return z, opt_state, model_state, total + loss.astype(jnp.float32)

            return jax.lax.fori_loop(0, count, step, carry)

        self._many = jax.jit(many, donate_argnums=0)
        self._fixed = (x, state.rng)

    def __call__(self, args: tuple, steps: int) -> float:
        """Takes that many steps from the start; returns the seconds."""
        carry = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), self._start)
        inner, positions = args[0], args[2]
        count = np.int32(steps)
        began = time.perf_counter()
        jax.block_until_ready(self._many(carry, *self._fixed, inner, positions, count))
        return time.perf_counter() - began
