"""What a bilevel step costs: microseconds, multiples of a plain Optax step, FLOPs.

    python benchmarks/step_cost.py [--repeats 5] [--markdown]

Times are the best of `--repeats` rounds, in which all variants take turns, in wall and CPU time;
ratios compare variants of one run. Data are random numbers of the published sizes: timings do not
depend on the values.
"""

from __future__ import annotations

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from benchmarks.rows import Rows, add_argument
from bilevel_flax import data
from bilevel_flax.train.step_runner import StepRunner


def images(n: int, batch_size: int) -> data.FiniteSum:
    """Random 784-pixel images with labels."""
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(n, 784)).astype(np.float32),
        "label": rng.integers(0, 10, n).astype(np.int32),
    }
    return data.partition(arrays, batch_size)


def cross_entropy(logits, batch):
    """Per-example losses."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def linear(params, batch):
    """784 x 10."""
    return batch["image"] @ params["kernel"]


def mlp(params, batch):
    """784 - 256 - 10."""
    hidden = jax.nn.relu(batch["image"] @ params["first"] + params["bias"])
    return hidden @ params["second"]


def weighted_problem(apply, regularization: float) -> bf.Problem:
    """Cleaning with sigmoid weights."""

    def inner_loss(z, x, batch):
        losses = jax.nn.sigmoid(x) * cross_entropy(apply(z, batch), batch)
        penalty = regularization * optax.tree.norm(z, squared=True)
        return bf.masked_mean(losses, batch.get("mask")) + penalty

    def outer_loss(z, x, batch):
        return bf.masked_mean(cross_entropy(apply(z, batch), batch), batch.get("mask"))

    return bf.Problem(inner_loss, outer_loss, per_sample=True)


class Bilevel:
    """SOBA in the library's own loop."""

    def __init__(self, apply, params, inner, outer, regularization):
        solver = bf.soba(
            weighted_problem(apply, regularization),
            inner=optax.sgd(0.003),
            outer=bf.outer.normalized_sgd(0.5),
            inner_weights=inner.weights if inner.ragged else None,
            outer_weights=outer.weights if outer.ragged else None,
        )
        self._state = solver.init(params, jnp.full((inner.num_samples,), -2.0))
        self._loop = StepRunner(solver, inner, outer, on_device=True, target_seconds=10.0)
        self._step = 0
        self.run(1000)

    def run(self, steps: int) -> None:
        """Takes `steps` steps."""
        stop = self._step + steps
        while self._step < stop:
            self._state, info = self._loop.run(self._state, self._step, stop)
            self._step += len(info.inner_loss)


class Plain:
    """Ordinary training: Optax SGD on the mean loss, minibatches sliced in a compiled loop."""

    def __init__(self, apply, params, inner, regularization):
        optimizer = optax.sgd(0.003)

        def loss(z, batch):
            mean = bf.masked_mean(cross_entropy(apply(z, batch), batch), batch.get("mask"))
            return mean + regularization * optax.tree.norm(z, squared=True)

        def many(carry, batches, ids, steps):
            def step(i, carry):
                z, state = carry
                batch = jax.tree.map(
                    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, ids[i], keepdims=False), batches
                )
                updates, state = optimizer.update(jax.grad(loss)(z, batch), state)
                return optax.apply_updates(z, updates), state

            return jax.lax.fori_loop(0, steps, step, carry)

        self._run = jax.jit(many, donate_argnums=0)
        self._batches = jax.device_put(inner.batches)
        self._ids = data.Sampler(inner.num_batches, 0).ids(0, 1000)
        self._carry = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
        self._carry = (self._carry, optimizer.init(self._carry))
        self.run(1000)

    def run(self, steps: int) -> None:
        """Takes `steps` <= 1000 steps."""
        self._carry = self._run(self._carry, self._batches, self._ids, steps)
        jax.block_until_ready(self._carry)


def timed(variants: dict, repeats: int, steps: int = 1000) -> dict[str, tuple[float, float]]:
    """Best wall and CPU microseconds a step of each variant; they take turns."""
    best = {name: (np.inf, np.inf) for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            variant.run(steps)
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            pairs = zip(best[name], spent, strict=True)
            best[name] = tuple(min(old, 1e6 * new / steps) for old, new in pairs)
    return best


class Block(nn.Module):
    """A pre-norm transformer block."""

    dim: int
    heads: int

    @nn.compact
    def __call__(self, x):
        """[batch, length, dim] -> the same."""
        y = nn.LayerNorm()(x)
        x = x + nn.SelfAttention(self.heads)(y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(self.dim)(nn.gelu(nn.Dense(4 * self.dim)(y)))


class Transformer(nn.Module):
    """A causal-free 6-layer byte model; only its cost matters here."""

    dim: int = 128
    layers: int = 6
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens):
        """[batch, length] int -> logits."""
        x = nn.Embed(self.vocabulary, self.dim)(tokens)
        for _ in range(self.layers):
            x = Block(self.dim, 4)(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def transformer_flops() -> dict[str, float]:
    """Compiled FLOPs of a SOBA step and its parts as multiples of one gradient of G."""
    model = Transformer()
    tokens = jnp.zeros((8, 64), jnp.int32)
    params = model.init(jax.random.key(0), tokens)

    def loss(z, x, batch):
        logits = model.apply(z, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean(-1)
        return jnp.mean(x * losses)

    def outer_loss(z, x, batch):
        return loss(z, jnp.ones(()), batch)

    problem = bf.Problem(loss, outer_loss)
    solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = jax.eval_shape(solver.init, params, jnp.ones(()))
    batch = bf.Batch(tokens, tokens)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    gradient = flops(jax.grad(loss), params, jnp.ones(()), tokens)
    return {
        "SOBA step": flops(solver.update, state, batch) / gradient,
        "three inner quantities": flops(
            lambda s: bf.oracles.inner_products(problem, s.variables, tokens)[1:], state
        )
        / gradient,
    }


class ScannedTransformer(nn.Module):
    """The same model with its blocks rematerialised, in a scan.

    In straight-line code XLA's CPU compiler merges the recomputed forward pass back, and
    `jax.checkpoint` saves nothing there.
    """

    dim: int = 128
    layers: int = 6
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens):
        """[batch, length] int -> logits."""

        class Layer(nn.Module):
            dim: int

            @nn.compact
            def __call__(self, x, _):
                return Block(self.dim, 4)(x), None

        x = nn.Embed(self.vocabulary, self.dim)(tokens)
        blocks = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(self.dim)(x, None)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def remat_memory(batch_size: int = 32) -> dict[str, float]:
    """Temporary MiB of a step with rematerialised blocks, AdamW on z, buffers donated."""
    model, optimizer = ScannedTransformer(), optax.adamw(1e-3)
    tokens = jax.ShapeDtypeStruct((batch_size, 64), jnp.int32)
    x = jax.ShapeDtypeStruct((), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(z, x, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(model.apply(z, batch), batch)
        return jax.nn.sigmoid(x) * jnp.mean(losses)

    def plain(z, opt_state, x, batch):
        updates, opt_state = optimizer.update(jax.grad(loss)(z, x, batch), opt_state, z)
        return optax.apply_updates(z, updates), opt_state

    def mebibytes(function, donated, *args):
        compiled = jax.jit(function, donate_argnums=donated).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    def problem(microbatches):
        outer = lambda z, x, batch: loss(z, 0.0 * x, batch)
        return bf.oracles.microbatched(bf.Problem(loss, outer), microbatches)

    opt_state = jax.eval_shape(optimizer.init, params)
    sizes = {"plain": mebibytes(plain, (0, 1), params, opt_state, x, tokens)}
    for name, count, settings in (
        ("auto", 1, {}),
        ("auto, microbatches=2", 2, {}),
        ("auto, microbatches=4", 4, {}),
        ("auto, subsample=.5", 1, {"subsample": 0.5}),
        ("auto, subsample=.25", 1, {"subsample": 0.25}),
    ):
        solver = bf.auto(problem(count), inner=optimizer, steps=100, **settings)
        state = jax.eval_shape(solver.init, params, x)
        sizes[name] = mebibytes(solver.update, (0,), state, bf.Batch(tokens, tokens))
    return sizes


def step_times(repeats: int, rows: Rows) -> None:
    """The first two tables."""
    inner, outer = images(20_000, 64), images(5_000, 64)
    params = {"kernel": jnp.zeros((784, 10))}
    results = timed({"SOBA": Bilevel(linear, params, inner, outer, 0.2)}, repeats)
    wall, cpu = (f"{value:.0f}" for value in results["SOBA"])
    title = "Linear 784 x 10, 20,000 weights, batch 64 + 64"
    rows.add({"step": "SOBA", "wall µs": wall, "CPU µs": cpu}, title)

    inner, outer = images(20_000, 128), images(5_000, 128)
    key = jax.random.key(0)
    params = {
        "first": jax.random.normal(key, (784, 256)) / 28,
        "bias": jnp.zeros(256),
        "second": jax.random.normal(key, (256, 10)) / 16,
    }
    bilevel = Bilevel(mlp, params, inner, outer, 1e-4)
    plain = Plain(mlp, params, inner, 1e-4)
    results = timed({"SOBA": bilevel, "plain": plain}, repeats)
    for name, (wall, cpu) in results.items():
        row = {"step": name, "wall µs": f"{wall:.0f}", "CPU µs": f"{cpu:.0f}"}
        row["wall, x plain"] = f"{wall / results['plain'][0]:.2f}"
        row["CPU, x plain"] = f"{cpu / results['plain'][1]:.2f}"
        rows.add(row, "MLP 784-256-10, 20,000 weights, batch 128 + 128")


def main() -> None:
    """Prints the four tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    add_argument(parser)
    options = parser.parse_args()
    with Rows(options.markdown) as rows:
        step_times(options.repeats, rows)
        for name, ratio in transformer_flops().items():
            row = {"": name, "FLOPs / a gradient of G": f"{ratio:.3f}"}
            rows.add(row, "6-layer transformer, as compiled")
        sizes = remat_memory()
        for name, size in sizes.items():
            row = {"step": name, "temporary MiB": f"{size:.1f}"}
            row["x plain"] = f"{size / sizes['plain']:.2f}"
            rows.add(row, "6-layer transformer, rematerialised blocks, batch 32")


if __name__ == "__main__":
    main()
