"""Per-sample weights spread over 8 devices, for `many_weights_test.py`.

For each way to run a step: how far its state is from that of one device after a few steps, what it
sends between devices, and what it keeps on each of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import sharding
from bilevel_flax.outer import lazy_adam
from bilevel_flax.plan.collectives import instructions

WAYS = {
    "soba": {
        "partitioned": {},
        "shared": {"shared": True},
        "microbatches": {"shared": True, "microbatches": 2},
    },
    "saba": {"shared": {"shared": True}},
}
ROWS, BATCH, FEATURES, STEPS = 80_000, 32, 6, 3


def loss(z, batch):
    hidden = jnp.tanh(batch["inputs"] @ z["w"])
    return (hidden @ z["v"] - batch["target"]) ** 2


PROBLEM = bf.Problem(
    lambda z, x, batch: (
        jnp.mean(jax.nn.sigmoid(x["w"]) * loss(z, batch)) + jnp.exp(x["p"]) * jnp.sum(z["w"] ** 2)
    ),
    lambda z, x, batch: jnp.mean(loss(z, batch)),
    per_sample={"w": True, "p": False},
)


def start():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"w": draw(FEATURES, 8), "v": draw(8)}, {"w": draw(ROWS), "p": jnp.float32(-3.0)}


def batches():
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        side = {
            "inputs": rng.normal(size=(BATCH, FEATURES)).astype(np.float32),
            "target": rng.normal(size=BATCH).astype(np.float32),
            "index": rng.integers(0, ROWS, size=BATCH).astype(np.int32),
        }
        yield bf.Batch(side, side, np.int32(0), np.int32(1))


def make(solver: str, problem):
    rates = {"inner": optax.sgd(0.1), "outer": lazy_adam(0.1)}
    if solver == "saba":
        return bf.saba(problem, **rates, num_inner_batches=2, num_outer_batches=2)
    return bf.soba(problem, **rates)


def run(solver: str, mesh=None, shared: bool = False, microbatches: int = 1):
    """The last state, and the step (compiled where there is a mesh)."""
    problem = bf.oracles.microbatched(PROBLEM, microbatches)
    if shared:
        problem = sharding.data_parallel(problem, mesh)
    made = make(solver, problem)
    state = made.init(*start())
    if mesh is None:
        update = jax.jit(made.update)
    else:
        at = sharding.state_shardings(state, mesh, None, PROBLEM)
        batch_at = sharding.batch_shardings(next(batches()), mesh)
        state = jax.device_put(state, at)
        step = jax.jit(
            made.update, in_shardings=(at, batch_at), out_shardings=(at, None), donate_argnums=0
        )
        update = step.lower(state, next(batches())).compile()
    for batch in batches():
        if mesh is not None:
            batch = jax.device_put(batch, batch_at)
        state, info = update(state, batch)
        bf.check_finite(info)
    return state, update


def measured() -> dict[str, dict[str, float]]:
    """For each way to run a step, what it differs by, sends and keeps."""
    mesh = sharding.make_mesh("data=4,fsdp=2")
    found = {}
    for solver, ways in WAYS.items():
        expected, _ = run(solver)
        for name, how in ways.items():
            state, compiled = run(solver, mesh, **how)
            apart = jax.tree.map(
                lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0.0)),
                (state.variables, state.outer_opt_state),
                (expected.variables, expected.outer_opt_state),
            )
            sent = instructions(compiled.as_text())
            arguments = compiled.memory_analysis().argument_size_in_bytes
            found[f"{solver} {name}"] = {
                "apart": max(jax.tree.leaves(apart)),
                "largest": max(one.bytes for one in sent),
                "times": sum(one.count for one in sent),
                "bytes": sum(one.bytes * one.count for one in sent),
                "temporary": compiled.memory_analysis().temp_size_in_bytes,
                "arguments": arguments,
            }
    return found
