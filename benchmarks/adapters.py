"""What the trainers' adapters cost on top of the library's own loop.

    python benchmarks/adapters.py [--steps 20] [--rounds 9] [--markdown]

One language model and one solver in two loops that take turns in one process: `jax.jit` of
`solver.update`, and the adapter as its guide page shows it. The ratio of CPU times is taken in each
round, in which the order changes; printed are its median and quartiles, and the milliseconds more
that a step takes. What `nnx.jit` spends on each call, to look up a module's variables, is among
them: it depends on how many there are, and not on their size.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax.trainers import flax as flax_adapter
from bilevel_flax.trainers import nnx as nnx_adapter
from bilevel_flax.trainers import solver_optimizer

VOCABULARY, WIDTH, LAYERS, BATCH, LENGTH = 256, 128, 2, 8, 64
MIXTURE = bf.outer.domain_weights(2)

Run = Callable[[int], None]


class Linen(nn.Module):
    """Residual layers on bytes."""

    @nn.compact
    def __call__(self, tokens):
        """Logits, [batch, length, vocabulary]."""
        hidden = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(LAYERS):
            hidden += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(hidden))))
        return nn.Dense(VOCABULARY)(hidden)


class Modules(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List(
            nnx.Sequential(
                nnx.LayerNorm(WIDTH, rngs=rngs),
                nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs),
                nnx.gelu,
                nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs),
            )
            for _ in range(LAYERS)
        )
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        """Logits, [batch, length, vocabulary]."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden += layer(hidden)
        return self.head(hidden)


def nats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of each window, [batch]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def solver_of(problem: bf.Problem) -> bf.BilevelSolver:
    """Of both loops."""
    return bf.auto(problem, inner=optax.adam(1e-3), steps=100_000)


def own_loop(solver: bf.BilevelSolver, state: bf.TrainState, batch: bf.Batch) -> Run:
    """`jax.jit` of `solver.update`."""
    update = jax.jit(solver.update, donate_argnums=0)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, _ = update(state, batch)
        jax.block_until_ready(state)

    return run


def of_flax(batch: bf.Batch) -> tuple[Run, Run]:
    """Our loop, and that of a `TrainState`."""
    model = Linen()
    losses = lambda z, batch: nats(
        jnp.asarray(model.apply({"params": z}, batch["tokens"][:, :-1])), batch["tokens"]
    )
    problem = bf.Problem(
        lambda z, x, batch: (MIXTURE.weights(x, batch) * losses(z, batch)).mean(),
        lambda z, x, batch: losses(z, batch).mean(),
    )
    solver = solver_of(problem)
    make = lambda: model.init(jax.random.key(0), batch.inner["tokens"])["params"]
    tx = solver_optimizer(solver, MIXTURE.init())
    state = TrainState.create(apply_fn=model.apply, params=make(), tx=tx)
    step = jax.jit(flax_adapter.apply_batch, donate_argnums=0)

    def run(steps):
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, batch)
        jax.block_until_ready(state.params)

    return own_loop(solver, solver.init(make(), MIXTURE.init()), batch), run


def of_nnx(batch: bf.Batch, split: bool) -> tuple[Run, Run]:
    """Our loop on the module's arrays, and that of an `nnx.Optimizer`.

    Args:
        batch: both minibatches.
        split: the loop carries the arrays, and module and optimiser are put together inside of
            `jax.jit`; otherwise `nnx.jit` is handed both.
    """
    model = Modules(nnx.Rngs(0))
    losses = lambda model, batch: nats(model(batch["tokens"][:, :-1]), batch["tokens"])
    x = MIXTURE.init()
    problem = bf.nnx.problem(
        lambda model, x, batch: (MIXTURE.weights(x, batch) * losses(model, batch)).mean(),
        lambda model, x, batch: losses(model, batch).mean(),
        model,
        x,
    )
    solver = solver_of(problem)
    own = own_loop(solver, bf.nnx.init(solver, Modules(nnx.Rngs(0)), x), batch)
    optimizer = nnx.Optimizer(model, solver_optimizer(solver, x), wrt=nnx.Param)
    if split:
        return own, split_loop(model, optimizer, batch)
    # As a loop of NNX that is to be fast does it: the references are looked up once.
    step = nnx.cached_partial(nnx.jit(nnx_adapter.update), model, optimizer)

    def run(steps):
        for _ in range(steps):
            info = step(batch)
        jax.block_until_ready(info.inner_loss)

    return own, run


def split_loop(model: nnx.Module, optimizer: nnx.Optimizer, batch: bf.Batch) -> Run:
    """That of docs/trainers.md: NNX takes module and optimiser apart once."""
    graphdef, state = nnx.split((model, optimizer))
    arrays, treedef = jax.tree.flatten(state)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(arrays, batch):
        model, optimizer = nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))
        info = nnx_adapter.update(model, optimizer, batch)
        return jax.tree.leaves(nnx.state((model, optimizer))), info

    def run(steps):
        nonlocal arrays
        for _ in range(steps):
            arrays, _ = step(arrays, batch)
        jax.block_until_ready(arrays)

    return run


def times(own: Run, adapter: Run, steps: int, rounds: int) -> np.ndarray:
    """CPU milliseconds of a step in our loop and in the adapter's, [rounds, 2]."""
    results = []
    for number in range(rounds + 1):  # the first one compiles
        seconds = {}
        for run in (own, adapter)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            run(steps)
            seconds[run] = time.process_time() - began
        if number:
            results.append([1e3 * seconds[run] / steps for run in (own, adapter)])
    return np.array(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of a loop in a round")
    parser.add_argument("--rounds", type=int, default=9)
    add_argument(parser)
    given = parser.parse_args()
    loops: dict[str, Callable[[bf.Batch], tuple[Run, Run]]] = {
        "Flax TrainState": of_flax,
        "nnx.Optimizer, split once": functools.partial(of_nnx, split=True),
        "nnx.Optimizer, nnx.jit": functools.partial(of_nnx, split=False),
    }
    report(loops, given)


def report(loops: Mapping[str, Callable[[bf.Batch], tuple[Run, Run]]], given: Any) -> None:
    """Prints a row for each; `given` has `steps`, `rounds` and `markdown`."""
    rng = np.random.default_rng(0)
    side = lambda: {
        "tokens": jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1)), jnp.int32),
        "domain": jnp.arange(BATCH) % 2,
    }
    batch = bf.Batch(side(), side())
    with Rows(given.markdown) as rows:
        for name, make in loops.items():
            ours, theirs = times(*make(batch), given.steps, given.rounds).T
            low, middle, high = np.percentile(theirs / ours, (25, 50, 75))
            row = {
                "adapter": name,
                "ratio": f"{middle:.3f} ({low:.3f} to {high:.3f})",
                "own step, ms": f"{np.median(ours):.2f}",
                "more, ms": f"{np.median(theirs - ours):+.2f}",
            }
            rows.add(row)


if __name__ == "__main__":
    main()
