"""What a step moves between 8 devices, in bytes of the parameters: one reduction, or left to XLA.

    python benchmarks/collective_bytes.py

Result bytes of the collectives on one device, and what a device sends for them in rings of its
group, read from the compiled programs of 8 virtual CPU devices: four 256 x 256 layers, batch 64.
"plain" is a gradient step of G, left to XLA.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax import sharding
from bilevel_flax.plan.collectives import instructions
from bilevel_flax.solvers import table

WIDTH, DEPTH, BATCH = 256, 4, 64
SOLVERS = {
    "soba": {},
    "saba": {"num_inner_batches": 4, "num_outer_batches": 4},
    "srba": {"num_inner_batches": 4, "num_outer_batches": 4, "period": 5},
    "storm": {},
    "auto": {"steps": 10},
}
# What a device sends in a ring of n, in shares of the result's bytes.
RING = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
}
PARAMS = {f"layer{i}": np.zeros((WIDTH, WIDTH), np.float32) for i in range(DEPTH)}
SIDE = {name: np.zeros((BATCH, WIDTH), np.float32) for name in ("a", "y")}
PENALTY = np.float32(-3.0)


def outer_loss(z, x, batch):
    """A tanh network's square error."""
    del x
    out = batch["a"]
    for name in sorted(z):
        out = jnp.tanh(out @ z[name])
    return bf.masked_mean(jnp.sum((out - batch["y"]) ** 2, -1))


def inner_loss(z, x, batch):
    """The same with a penalty."""
    return outer_loss(z, x, batch) + jnp.exp(x) * sum(jnp.sum(leaf**2) for leaf in z.values())


def moved(compiled) -> tuple[float, float]:
    """Bytes of all collectives over those of the parameters: of results, and sent in rings."""
    sizes = [(one, one.bytes * one.count) for one in instructions(compiled.as_text())]
    sent = sum(size * RING.get(one.kind, lambda n: 1)(one.group_size or 8) for one, size in sizes)
    of = sum(leaf.nbytes for leaf in PARAMS.values())
    return sum(size for _, size in sizes) / of, sent / of


def bilevel(name: str, text: str, floor: bool) -> tuple[float, float]:
    """Of a solver's step."""
    mesh = sharding.make_mesh(text)
    problem = bf.Problem(inner_loss, outer_loss)
    shared = sharding.data_parallel(problem, mesh) if floor else problem
    optimisers = {"inner": optax.adam(1e-3)}
    if name != "auto":
        optimisers["outer"] = optax.sgd(0.1)
    solver = table.method(name)(shared, **optimisers, **SOLVERS[name])
    state = jax.eval_shape(solver.init, PARAMS, PENALTY)
    here = sharding.state_shardings(state, mesh, None, problem)
    batch = bf.Batch(SIDE, SIDE, jnp.int32(0), jnp.int32(0))
    step = jax.jit(
        solver.update,
        in_shardings=(here, sharding.batch_shardings(batch, mesh)),
        out_shardings=(here, None),
        donate_argnums=0,
    )
    return moved(step.lower(state, batch).compile())


def plain(text: str) -> tuple[float, float]:
    """Of a gradient step of G."""
    mesh = sharding.make_mesh(text)
    specs = sharding.param_specs(PARAMS, mesh)
    here = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )

    def update(z, batch):
        grads = jax.grad(inner_loss)(z, PENALTY, batch)
        return jax.tree.map(lambda leaf, grad: leaf - 1e-3 * grad, z, grads)

    step = jax.jit(
        update, in_shardings=(here, sharding.batch_shardings(SIDE, mesh)), out_shardings=here
    )
    return moved(step.lower(PARAMS, SIDE).compile())


def main() -> None:
    """Prints a row for each mesh and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_argument(parser)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    with Rows(options.markdown) as rows:
        for text in ("data=8", "data=2,fsdp=4"):
            for name in ("plain", *SOLVERS):
                shares = (
                    ("", "") if name == "plain" else map("{:.3f}".format, bilevel(name, text, True))
                )
                left = plain(text) if name == "plain" else bilevel(name, text, False)
                row = {"mesh": text, "method": name}
                row |= zip(("in shares", "sent"), shares, strict=True)
                rows.add(row | {"left to XLA": f"{left[0]:.3f}", "it sends": f"{left[1]:.3f}"})


if __name__ == "__main__":
    main()
