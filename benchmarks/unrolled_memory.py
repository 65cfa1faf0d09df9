"""Unrolled differentiation of a transformer's training: memory, time, and what others would do.

    python benchmarks/unrolled_memory.py [--steps 2 8] [--layers 6]

d/dx F(z_K(x), x) through K steps of SGD on a decoder with rematerialised blocks; x is a weight for
each of 8 domains. Temporary memory is what XLA assigns to the compiled program; times are the best
of `--repeats` rounds in which all variants take turns. Variants, all of them the same number:

* naive: `jax.grad` of a `lax.scan` of `jax.grad` steps (JAXopt's `unroll=True`);
* checkpointed: the same with `jax.checkpoint` around every step;
* bf.unrolled: checkpointed steps, ∇₁G in mixed mode.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument

VOCABULARY, DOMAINS, RATE = 64, 8, 0.1


def initial(layers: int, width: int) -> dict:
    """Blocks stacked along a leading axis."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple] = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
    }
    shapes["down"] = shapes["up"][::-1]
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)
    blocks = {name: draw(layers, *shape) for name, shape in shapes.items()}
    return {
        "embedding": draw(VOCABULARY, width),
        "blocks": blocks,
        "logits": draw(width, VOCABULARY),
    }


def losses_of(z, batch, heads: int = 4):
    """Cross-entropies of the next token, [batch]."""

    def normed(h):
        return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)

    def block(h, w):
        q, k, v = jnp.split(normed(h) @ w["qkv"], 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
        h = h + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape) @ w["out"]
        return h + jax.nn.gelu(normed(h) @ w["up"]) @ w["down"], None

    tokens = batch["tokens"]
    body = jax.checkpoint(block, prevent_cse=False)
    h, _ = jax.lax.scan(body, z["embedding"][tokens[:, :-1]], z["blocks"])
    logits = normed(h) @ z["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def inner_loss(z, x, batch):
    """G: domains are weighed."""
    return jnp.mean(jax.nn.softmax(x)[batch["domain"]] * DOMAINS * losses_of(z, batch))


def outer_loss(z, x, batch):
    """F."""
    del x
    return jnp.mean(losses_of(z, batch))


def by_hand(around, z, x, batch):
    """The gradient as JAX writes it."""

    def value(x):
        def step(z, minibatch):
            grads = jax.grad(inner_loss)(z, x, minibatch)
            return jax.tree.map(lambda a, g: a - RATE * g, z, grads), None

        end, _ = jax.lax.scan(around(step), z, batch.inner)
        return outer_loss(end, x, jax.tree.map(lambda leaf: leaf[0], batch.outer))

    return jax.grad(value)(x)


def ours(steps, z, x, batch):
    """The move of x under SGD with a step of 1."""
    problem = bf.Problem(inner_loss, outer_loss)
    solver = bf.unrolled(problem, inner=optax.sgd(RATE), outer=optax.sgd(1.0), inner_steps=steps)
    return x - solver.update(solver.init(z, x), batch)[0].outer_params


def measure(layers: int, width: int, length: int, size: int, steps: int, repeats: int) -> dict:
    """`{variant: {"temporary_bytes", "seconds", "difference"}}`, the last relative to naive."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: {
        "tokens": jnp.asarray(rng.integers(0, VOCABULARY, (*shape, length + 1)), jnp.int32),
        "domain": jnp.asarray(rng.integers(0, DOMAINS, shape), jnp.int32),
    }
    z, x = initial(layers, width), jnp.zeros(DOMAINS)
    batch = bf.Batch(draw(steps, size), draw(1, size))
    checkpointed = functools.partial(jax.checkpoint, prevent_cse=False)
    variants = {
        "naive": functools.partial(by_hand, lambda step: step),
        "checkpointed": functools.partial(by_hand, checkpointed),
        "bf.unrolled": functools.partial(ours, steps),
    }
    compiled = {
        name: jax.jit(function).lower(z, x, batch).compile() for name, function in variants.items()
    }
    values = {name: np.asarray(run(z, x, batch)) for name, run in compiled.items()}
    best = dict.fromkeys(compiled, np.inf)
    for _ in range(repeats):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(z, x, batch))
            best[name] = min(best[name], time.perf_counter() - start)
    size_of = np.linalg.norm(values["naive"])
    return {
        name: {
            "temporary_bytes": getattr(run.memory_analysis(), "temp_size_in_bytes", 0),
            "seconds": best[name],
            "difference": float(np.linalg.norm(values[name] - values["naive"]) / size_of),
        }
        for name, run in compiled.items()
    }


def main() -> None:
    """Prints a row for each number of steps and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 8])
    for name, default in (("layers", 6), ("width", 32), ("length", 64), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=2)
    add_argument(parser)
    args = parser.parse_args()
    sizes = args.layers, args.width, args.length, args.batch
    with Rows(args.markdown) as rows:
        for steps in args.steps:
            for name, found in measure(*sizes, steps, args.repeats).items():
                row = {"inner steps": steps, "method": name}
                row["temporary MB"] = f"{found['temporary_bytes'] / 1e6:.1f}"
                row["seconds"] = f"{found['seconds']:.3f}"
                rows.add({**row, "difference": f"{found['difference']:.1e}"})


if __name__ == "__main__":
    main()
