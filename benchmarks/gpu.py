"""What a bilevel step costs on an accelerator: one command, at most 8 minutes on one GPU.

    python benchmarks/gpu.py [--size full|tiny] [--minutes 8] [--out gpu.json] [--only NAME ...]

Everything runs on random numbers of the real sizes: timings do not depend on values, and no data is
needed. For a GPT of 124M parameters (as it is, with rematerialised layers, with fused attention),
ResNet-50 and the example's CNN: a plain Optax step, SOBA written by hand in JAX, and the library's
methods, with the step's time, the temporary memory of the compiled program, the device's peak, the
seconds of compilation and tokens or images a second. Then `lm_pod:small`, a weight for each of 1e4
and 1e8 examples, DARTS's search step, the cleaning loop beside plain training in the same loop, how
exact the derivatives of fused attention are, and, where PyTorch is installed, the CNN's step there.

The entries take turns, so that every one has its first rows early; DARTS, which compiles longest,
comes last. `--out` is written after every row: an error (no memory, a kernel that is not there) is
that row's result, and what does not fit into `--minutes` is left out, and the file says so. A row
that is not done by then ends the program.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from benchmarks import step_time
from benchmarks.rows import Rows, add_argument
from benchmarks.tasks import networks, torch_steps
from bilevel_flax import data
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.workdir import write_json
from examples.darts import task as darts_task
from examples.darts.network import SearchNetwork, make_stack
from examples.darts.optimizers import make_optimizer
from examples.language_model.model import SIZES as DECODERS
from examples.language_model.model import Size
from examples.mnist_hypercleaning.model import make_model
from examples.mnist_hypercleaning.task import make_problem

GPT = Size(layers=12, width=768, heads=12, hidden=2048, vocabulary=50_304)
# Per size: (decoder, batch, length) of two decoders, (stages, width, side, batch) of the ResNet,
# the CNN's batch, (numbers of weights), (cells, width, side, batch, reductions) of DARTS, examples
# of the cleaning loop, [batch, length, heads, size of a head] of attention, seconds of one
# measurement, and the variants (None: all).
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "gpt": (GPT, 16, 1024),
        "lm_pod small": (DECODERS["small"], 8, 512),
        "resnet": ((3, 4, 6, 3), 64, 224, 64),
        "cnn": 64,
        "weights": (10**4, 10**8),
        "darts": (8, 16, 32, 64, (2, 5)),
        "cleaning": 20_000,
        "attention": (4, 1024, 12, 64),
        "seconds": 1.5,
        "variants": None,
    },
    "tiny": {
        "gpt": (Size(layers=1, width=8, heads=2, hidden=8, vocabulary=16), 2, 8),
        "lm_pod small": (Size(layers=1, width=8, heads=2, hidden=8, vocabulary=16), 2, 8),
        "resnet": ((1,), 4, 16, 2),
        "cnn": 4,
        "weights": (100, 1000),
        "darts": (2, 2, 8, 2, (1,)),
        "cleaning": 64,
        "attention": (2, 8, 2, 4),
        "seconds": 0.0,
        "variants": ("plain", "bf.soba"),
    },
}


def by_hand(network: networks.Network, optimiser: Any) -> Callable[..., Any]:
    """SOBA's step as one would write it: `step((z, v, x, states, model_state), batch)`."""

    def step(carry, batch):
        z, v, x, (state_z, state_v), model_state = carry

        def grads(z):
            value = jax.value_and_grad(network.inner, (0, 1), has_aux=True)
            (_, state), both = value(z, x, batch, model_state)
            return both, state

        (d_z, _), (hvp, cross), state = jax.jvp(grads, (z,), (v,), has_aux=True)
        at = jax.grad(network.outer, (0, 1), has_aux=True)
        (outer_z, outer_x), _ = at(z, x, batch, model_state)
        d_v = jax.tree.map(jnp.add, hvp, outer_z)
        move_z, state_z = optimiser.update(d_z, state_z, z)
        move_v, state_v = optimiser.update(d_v, state_v, v)
        z, v = optax.apply_updates(z, move_z), optax.apply_updates(v, move_v)
        return (z, v, x - 0.01 * (cross + outer_x), (state_z, state_v), state), None

    return step


def plain(network: networks.Network, optimiser: Any) -> Callable[..., Any]:
    """Training without hyperparameters: `step((z, x, state, model_state), batch)`."""

    def step(carry, batch):
        z, x, opt_state, state = carry
        grad, state = jax.grad(network.inner, has_aux=True)(z, x, batch, state)
        updates, opt_state = optimiser.update(grad, opt_state, z)
        return (optax.apply_updates(z, updates), x, opt_state, state), None

    return step


def variants(
    network: networks.Network,
) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """`(name, step, first carry)` of each; the carry is made when it is called."""
    optimiser, x = optax.adamw(1e-4), jnp.zeros(networks.DOMAINS)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)

    def started(of):
        def start():
            z, state = network.init()
            return of(z, state)

        return start

    yield (
        "plain",
        plain(network, optimiser),
        started(lambda z, state: (z, x, optimiser.init(z), state)),
    )
    by_hand_row = (
        "by hand",
        by_hand(network, optimiser),
        started(lambda z, state: (z, zeros(z), x, (optimiser.init(z),) * 2, state)),
    )
    problem = network.problem(stateful=jax.eval_shape(network.init)[1] is not None)
    auto = functools.partial(bf.auto, problem, inner=optimiser, steps=10_000)
    solvers = {
        "bf.soba": bf.soba(problem, inner=optimiser, outer=optax.sgd(0.01)),
        "bf.auto": auto(),
        "bf.auto cheap": auto(update_every=4, adjoint_update_every=2),
        "bf.auto, 2 microbatches": bf.auto(
            bf.oracles.microbatched(problem, 2), inner=optimiser, steps=10_000
        ),
        "bf.first_order": bf.first_order(problem, inner=optimiser, steps=10_000),
    }
    for name, (policy, parts) in KEPT.items():
        kept = bf.oracles.microbatched(bf.oracles.keep(problem, policy), parts)
        solvers[name] = bf.soba(kept, inner=optimiser, outer=optax.sgd(0.01))
    for name, solver in solvers.items():
        if name == "bf.auto":  # the two that are compared come first
            yield by_hand_row
        update = lambda state, batch, solver=solver: solver.update(state, bf.Batch(batch, batch))
        start = lambda z, state, solver=solver: solver.init(z, x, model_state=state)
        yield name, update, started(start)


def measured(
    step: Callable[..., Any], start: Callable[..., Any], batch: Any, seconds: float
) -> dict:
    """What a step takes; eight steps at least, for cheap settings work in every eighth.

    Args:
        step: `step(carry, batch) -> (carry, anything)`.
        start: makes the first carry.
        batch: on the host.
        seconds: to be spent on timing.
    """
    batch = jax.device_put(batch)
    carry = jax.jit(start)()  # as one program: op by op, a GPU compiles for 10 seconds
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(carry, batch).compile()
    found = {"compile_seconds": time.perf_counter() - began}
    found["temporary_bytes"] = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)

    def steps(carry, count):
        began = time.perf_counter()
        for _ in range(count):
            carry, _ = compiled(carry, batch)
        jax.block_until_ready(carry)
        return carry, (time.perf_counter() - began) / count

    carry, _ = steps(carry, 1)
    carry, pace = steps(carry, 8)
    best, ends = pace, time.perf_counter() + seconds
    while time.perf_counter() < ends:
        carry, pace = steps(carry, int(np.clip(seconds / 4 / best, 1, 20)) * 8)
        best = min(best, pace)
    found["step_seconds"] = best
    return found


class Row(NamedTuple):
    """A measurement that waits to be taken: what it is called, and what takes it."""

    variant: str
    measure: Callable[[], dict[str, Any]]


# What rematerialised blocks keep of themselves, and parts of a minibatch: `fit_memory` chooses
# among these, and for F by itself, by compiling and running fifteen programs.
KEPT = {
    "bf.soba, products kept, 4 microbatches": ("dots_saveable", 4),
    "bf.soba, all kept, 8 microbatches": ("everything_saveable", 8),
}
_TWO = ("plain", "bf.soba")
_ALL = (*_TWO, "by hand", "bf.auto", "bf.auto cheap", "bf.auto, 2 microbatches", "bf.first_order")
_REMAT = (*_TWO, "by hand", *KEPT)
_CHEAP = ("plain", "bf.auto", "bf.auto cheap")
RATIOS = {
    "plain_steps": "step_seconds",
    "plain_temporaries": "temporary_bytes",
    "plain_compile": "compile_seconds",
}


def network_rows(
    network: networks.Network, size: dict[str, Any], names: Sequence[str]
) -> Iterator[Row]:
    """A row for each of the variants named."""
    chosen = set(names) & set(size["variants"] or names)
    yield from over_plain(
        (each for each in variants(network) if each[0] in chosen),
        network.batch,
        network.items,
        size["seconds"],
    )


def over_plain(
    steps: Iterable[tuple[str, Callable[..., Any], Callable[..., Any]]],
    batch: dict,
    items: int,
    seconds: float,
) -> Iterator[Row]:
    """A row for each `(name, step, start)`; the ratios are to the row of "plain"."""
    plain_row: dict[str, Any] = {}

    def row(name, step, start):
        found = measured(step, start, batch, seconds)
        if name == "plain":
            plain_row.update(found)
        over_plain = {
            ratio: found[of] / plain_row[of]
            for ratio, of in RATIOS.items()
            if plain_row.get(of)  # it may not have fitted into the memory itself
        }
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        speed = items / found["step_seconds"]
        return {**found, **over_plain, "items_per_second": speed, "peak_bytes_so_far": peak}

    for name, step, start in steps:
        yield Row(name, functools.partial(row, name, step, start))


def fused_attention(*arrays: jax.Array, **settings: Any) -> jax.Array:
    """Attention by cuDNN (XLA where there is no GPU), with a reference's tangents."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return bf.oracles.dot_product_attention(*arrays, implementation=implementation, **settings)


def memory_bytes() -> float:
    """Of the device, as far as it says so."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


def gpt(size: dict[str, Any], remat: bool = False, fused: bool = False) -> Iterator[Row]:
    """The decoder in bfloat16; `fused`: cuDNN's attention with a reference's tangents.

    Without rematerialisation on half the sequences where the device has less than 100 GB.
    """
    attention = functools.partial(fused_attention, is_causal=True) if fused else None
    decoder, batch, length = size["gpt"]
    # An exact step that keeps all activations takes 85 GB for 16 sequences of 1,024.
    if not remat and memory_bytes() < 100e9:
        batch = max(2, batch // 2)
    network = networks.decoder(
        decoder, batch, length, dtype=jnp.bfloat16, remat=remat, attention=attention
    )
    yield from network_rows(network, size, _TWO if fused else _REMAT if remat else _ALL)


def lm_pod(size: dict[str, Any]) -> Iterator[Row]:
    """The decoder of `configs/lm_pod.py:small` in bfloat16."""
    network = networks.decoder(*size["lm_pod small"], dtype=jnp.bfloat16, remat=False)
    yield from network_rows(network, size, _CHEAP)


def attention(size: dict[str, Any]) -> Iterator[Row]:
    """How far value, gradient and tangent of the gradient are from float32, in its norm."""
    *primals, cotangent = jax.random.normal(jax.random.key(0), (4, *size["attention"]))
    tangents = jax.random.normal(jax.random.key(1), (3, *size["attention"]))

    def derivatives(of, dtype):
        loss = lambda arrays: jnp.sum(of(*arrays, is_causal=True).astype(jnp.float32) * cotangent)
        pairs = [[array.astype(dtype) for array in arrays] for arrays in (primals, tangents)]
        gradient = lambda arrays: jax.value_and_grad(loss)(arrays)
        compiled = jax.jit(lambda at, along: jax.jvp(gradient, (at,), (along,)))
        (value, grad), (_, tangent) = compiled(*pairs)
        return [
            jnp.concatenate([jnp.ravel(a).astype(jnp.float32) for a in leaves])
            for leaves in ([value], grad, tangent)
        ]

    def row(of) -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            right = derivatives(jax.nn.dot_product_attention, jnp.float32)
        found = derivatives(of, jnp.bfloat16)
        errors = [
            jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(found, right, strict=True)
        ]
        names = "value_error", "gradient_error", "tangent_error"
        return dict(zip(names, map(float, errors), strict=True))

    yield Row("XLA, bfloat16", functools.partial(row, jax.nn.dot_product_attention))
    yield Row("fused, bfloat16", functools.partial(row, fused_attention))


def resnet(size: dict[str, Any]) -> Iterator[Row]:
    """ResNet-50 in bfloat16."""
    network = networks.resnet(*size["resnet"], dtype=jnp.bfloat16)
    yield from network_rows(network, size, _ALL[:-1])


def cnn(size: dict[str, Any]) -> Iterator[Row]:
    """The CNN of the cleaning example in float32."""
    yield from network_rows(networks.small_cnn(size["cnn"]), size, _ALL)


def weights(size: dict[str, Any]) -> Iterator[Row]:
    """An MLP with a weight for each example, a row of a table moved by lazy Adam."""
    rng = np.random.default_rng(0)

    def losses(z, batch):
        logits = jax.nn.relu(batch["image"] @ z["first"]) @ z["second"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    problem = bf.Problem(
        lambda z, x, batch: jnp.mean(jax.nn.sigmoid(x) * losses(z, batch)),
        lambda z, x, batch: jnp.mean(losses(z, batch)),
        per_sample=True,
    )
    for count in size["weights"]:
        batch = {
            "image": rng.normal(size=(64, 784)).astype(np.float32),
            "label": rng.integers(0, 10, 64).astype(np.int32),
            "index": rng.integers(0, count, 64).astype(np.int32),
        }
        z = {"first": jnp.zeros((784, 256)), "second": jnp.zeros((256, 10))}
        solver = bf.soba(problem, inner=optax.sgd(0.01), outer=bf.outer.lazy_adam(0.1))
        update = lambda state, batch, solver=solver: solver.update(state, bf.Batch(batch, batch))
        start = lambda count=count, z=z, solver=solver: solver.init(z, jnp.zeros(count))
        args = update, start, batch, size["seconds"]
        yield Row(f"{count} weights", functools.partial(measured, *args))


class Search(NamedTuple):
    """DARTS's search as in `configs/darts_cifar10.py`.

    Attributes:
        problem: in bfloat16.
        inner: z's optimiser.
        start: `start() -> state` of `bf.auto`.
        batch: a minibatch.
    """

    problem: bf.Problem
    inner: optax.GradientTransformation
    start: Callable[[], bf.TrainState]
    batch: dict[str, Any]

    @property
    def solver(self) -> bf.BilevelSolver:
        """What learns the shares."""
        return bf.auto(self.problem, inner=self.inner, steps=10_000)


def search(size: dict[str, Any], dtype: str = "bfloat16") -> Search:
    """The search in one of the sizes, computed in bfloat16 or float32."""
    cells, width, side, count, reductions = size["darts"]
    network = SearchNetwork(make_stack(side, width, cells, reductions), 10, False)
    problem = darts_task.make_problem(network)
    if dtype != "float32":
        problem = bf.oracles.mixed_precision(problem, dtype)
    inner = make_optimizer(learning_rate=0.025, steps=10_000, name="momentum")
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(count, side, side, 3)).astype(np.float32),
        "label": rng.integers(0, 10, count).astype(np.int32),
    }

    def start():
        z = darts_task.search_parameters(network, jax.random.key(0), (side, side, 3))
        return made.solver.init(z, darts_task.MIXTURE.init(jax.random.key(1)))

    made = Search(problem, inner, start, batch)
    return made


def search_steps(made: Search) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """A step of the search, and of training the same network with shares that stand still."""
    solver, inner = made.solver, made.inner

    def plain_step(state, batch):
        z, x = state.inner_params, state.outer_params
        grad = jax.grad(made.problem.inner_loss)(z, x, batch)
        updates, opt_state = inner.update(grad, state.inner_opt_state, z)
        z = optax.apply_updates(z, updates)
        return state.replace(inner_params=z, inner_opt_state=opt_state), None

    yield "plain", plain_step, made.start
    yield "bf.auto", lambda state, batch: solver.update(state, bf.Batch(batch, batch)), made.start


def darts(size: dict[str, Any]) -> Iterator[Row]:
    """The search, and training its network alone: compilation, speed, memory."""
    made = search(size)
    items = len(made.batch["label"])
    yield from over_plain(search_steps(made), made.batch, items, size["seconds"])


def torch(size: dict[str, Any]) -> Iterator[Row]:
    """The CNN's steps in PyTorch: plain, by hand, and by its libraries for bilevel problems."""
    batch = networks.small_cnn(size["cnn"]).batch
    try:
        steps = torch_steps.make(batch)
    except ImportError as error:
        text = f"not measured: {error}"
        yield Row("all of it", lambda: {"error": text})
        return
    plain_row: dict[str, float] = {}

    def row(name, step):
        found = {"step_seconds": torch_steps.seconds(step, size["seconds"])}
        if name == "plain":
            plain_row.update(found)
        if plain_row:
            found["plain_steps"] = found["step_seconds"] / plain_row["step_seconds"]
        return {**found, "items_per_second": len(batch["label"]) / found["step_seconds"]}

    for name, step in steps.items():
        yield Row(name, functools.partial(row, name, step))


def cleaning(size: dict[str, Any]) -> Iterator[Row]:
    """The cleaning run's compiled loop beside plain training in the same loop."""
    count, rng = size["cleaning"], np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(count, 28, 28, 1)).astype(np.float32),
        "label": rng.integers(0, 10, count).astype(np.int32),
    }
    model, logits = make_model("cnn", 10), bf.outer.sigmoid(count)
    problem, inner = make_problem(model, logits, 1e-4), optax.sgd(0.03)
    side = data.partition(arrays, min(64, count))
    variables = dict(model.init(jax.random.key(0), arrays["image"][:2], train=False))
    params = variables.pop("params")

    def row(of_x, of_v):
        solver = bf.auto(
            problem, inner=inner, steps=10_000, update_every=of_x, adjoint_update_every=of_v
        )
        state = solver.init(params, logits.init(), model_state=variables)
        loop = StepRunner(solver, side, side, on_device=True)
        rounds = {"rounds": 1, "seconds": size["seconds"]}
        ours, alone = step_time.over_plain(loop, problem, inner, state, **rounds)
        return {
            "steps_per_second": 1 / ours,
            "plain_steps_per_second": 1 / alone,
            "plain_steps": ours / alone,
            "compile_seconds": loop.compile_seconds,
        }

    for name, every in {"auto": (1, 1), "cheap": (4, 2)}.items():
        yield Row(name, functools.partial(row, *every))


ENTRIES: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "gpt": gpt,
    "gpt fused": functools.partial(gpt, fused=True),
    "gpt remat": functools.partial(gpt, remat=True),
    "gpt remat fused": functools.partial(gpt, remat=True, fused=True),
    "resnet": resnet,
    "cnn": cnn,
    "lm_pod small": lm_pod,
    "weights": weights,
    "cleaning": cleaning,
    "attention": attention,
    "torch": torch,
    "darts": darts,
}


def in_turns(names: Sequence[str], size: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    """The rows of all entries: the first of each, the second of each, and so on; DARTS last."""
    entries = [_rows_of(name, size) for name in names if name != "darts"]
    for turn in itertools.zip_longest(*entries):
        yield from filter(None, turn)
    if "darts" in names:
        yield from _rows_of("darts", size)


def _rows_of(name: str, size: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    try:
        for row in ENTRIES[name](size):
            yield name, row
    except Exception as error:  # an entry that cannot even be made must not end the others
        text = _first_line(error)
        yield name, Row("all of it", lambda: {"error": text})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def run(
    size: str,
    minutes: float,
    only: Sequence[str] | None,
    add: Callable[[str, dict], None],
    save: Callable[[dict], None] = lambda results: None,
) -> dict:
    """Measures row after row until there is no time for another.

    Args:
        size: of `SIZES`.
        minutes: in which a row may begin.
        only: names of entries; None: all.
        add: told each row as soon as it is there.
        save: told all that is there, as often.

    Returns:
        "device", "jax", "size", "entries" (rows by entry) and "left_out" (names of rows).
    """
    ends = time.monotonic() + 60 * minutes
    rows = list(in_turns(list(only or ENTRIES), SIZES[size]))
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "size": size,
        "entries": {},
        "left_out": [f"{name}: {row.variant}" for name, row in rows],
    }
    save(results)
    for name, row in rows:
        if time.monotonic() > ends:
            break
        try:
            found = row.measure()
        except Exception as error:  # no memory, no such kernel: the next row may well run
            found = {"error": _first_line(error)}
        found = {"variant": row.variant, **found}
        results["entries"].setdefault(name, []).append(found)
        results["left_out"].pop(0)
        add(name, found)
        save(results)
    return results


def _shown(row: dict) -> dict[str, str]:
    """A row's numbers and words for a reader."""
    there = {name: value for name, value in row.items() if value is not None}
    return {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in there.items()}


def main() -> None:
    """Prints a line for each measurement and saves them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=None)
    add_argument(parser)
    args = parser.parse_args()

    def cut_off():  # what is being compiled cannot be stopped otherwise
        print(f"{args.minutes:g} minutes are over; {args.out} holds what was done", flush=True)
        os._exit(0)

    watchdog = threading.Timer(60 * args.minutes, cut_off)
    watchdog.daemon = True
    watchdog.start()
    device = jax.devices()[0].device_kind
    with Rows(args.markdown) as rows:
        add = lambda name, row: rows.add(_shown(row), f"{name} ({device})")
        save = functools.partial(write_json, args.out)
        results = run(args.size, args.minutes, args.only, add, save)
    watchdog.cancel()
    print(f"saved to {args.out}; left out: {results['left_out'] or 'nothing'}")


if __name__ == "__main__":
    main()
