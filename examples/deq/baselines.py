"""What the equilibrium network is compared with, from the same start, with the same optimiser.

* unrolled: the same layer iterated `unrolled_steps` times from 0, backprop through all of it.
* optimistix: the fixed point by its solver, differentiated implicitly by its adjoint.
* explicit: a network with two hidden layers of the same width, which has as many parameters.

Each step is measured alone (`examples.step_cost`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.data import Sampler
from examples.deq import model, solvers
from examples.step_cost import line, step_cost

HEADLINE = ("unrolled.test_error", "optimistix.test_error", "explicit.test_error")
Loss = Callable[[Any, Any], jax.Array]


def unrolled_loss(config: Any) -> Loss:
    """F after so many steps of the iteration."""

    def loss(x, batch):
        apply = model.layer(x, config.margin, batch["image"])

        def step(z, _):
            return z + config.step * (apply(z) - z), None

        start = jnp.zeros((len(batch["image"]), config.width))
        z, _ = jax.lax.scan(step, start, None, length=config.unrolled_steps)
        return _loss(config, x, z, batch)

    return loss


def optimistix_loss(config: Any) -> Loss:
    """F at the fixed point, with optimistix's implicit adjoint, by GMRES on the minibatch."""
    import lineax  # pyright: ignore[reportMissingImports]  an extra
    import optimistix  # pyright: ignore[reportMissingImports]

    solver = optimistix.FixedPointIteration(
        rtol=0.0, atol=config.step * config.tolerance, norm=optimistix.max_norm
    )
    adjoint = optimistix.ImplicitAdjoint(
        lineax.GMRES(rtol=config.tolerance, atol=config.tolerance, restart=config.adjoint_steps)
    )

    def loss(x, batch):
        def damped(z, x):
            return z + config.step * (model.layer(x, config.margin, batch["image"])(z) - z)

        start = jnp.zeros((len(batch["image"]), config.width))
        solution = optimistix.fixed_point(
            damped, solver, start, x, max_steps=config.max_iterations, adjoint=adjoint, throw=False
        )
        return _loss(config, x, solution.value, batch)

    return loss


def explicit_init(rng: jax.Array, like: model.Weights) -> model.Weights:
    """A network with a second hidden layer in the place of the recurrence."""
    width = len(like["bias"])
    second = jax.random.normal(rng, (2, width, width)) / jnp.sqrt(width)
    rest = {name: like[name] for name in ("input", "bias", "readout", "readout_bias")}
    return {**rest, "second": second[0], "third": second[1]}


def explicit_state(x: model.Weights, images: jax.Array) -> jax.Array:
    """Its last hidden layer."""
    hidden = jnp.tanh(images @ x["input"] + x["bias"][None])
    return jnp.tanh(jnp.tanh(hidden @ x["second"]) @ x["third"])


def _loss(config: Any, x: Any, z: jax.Array, batch: Any) -> jax.Array:
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))
    losses = model.cross_entropy(x, z, batch["label"])
    return bf.masked_mean(losses, batch.get("mask")) + 0.5 * config.decay * squares


def run(
    config: Any,
    problem: bf.Problem,
    side: data.FiniteSum,
    start: model.Weights,
    z: jax.Array,
    error: Callable[..., float],
    measured: tuple[np.ndarray, np.ndarray],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Trains the three and measures all steps.

    Args:
        config: the run's.
        problem: condition and loss of our own steps.
        side: the training minibatches.
        start: x at the run's start.
        z: at the run's start.
        error: of an equilibrium network.
        measured: test images and labels.
        log: prints a line.
    """
    tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

    def explicit(x, batch):
        return _loss(config, x, explicit_state(x, batch["image"]), batch)

    def explicit_error(x, images, labels):
        found = jnp.argmax(model.logits(x, explicit_state(x, images)), -1)
        return float(jnp.mean(found != labels))

    plain = {
        "unrolled": (unrolled_loss(config), start, error),
        "optimistix": (optimistix_loss(config), start, error),
        "explicit": (
            explicit,
            explicit_init(jax.random.PRNGKey(config.seed), start),
            explicit_error,
        ),
    }
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), side.batches)
    results: dict[str, Any] = {}
    for name, (loss, x, error_of) in plain.items():
        step = _plain_step(loss, tx)
        results[name] = step_cost(step, (x, tx.init(x)), batch)
        trained = _train(step, (x, tx.init(x)), side, config)
        results[name]["test_error"] = error_of(trained, *measured)
        log(f"{name:12s} {line(results[name])}")
    if config.states == "example":
        solver = solvers.tracked(problem, outer=tx)
    else:
        counts = {"inner_steps": config.inner_steps, "adjoint_steps": config.adjoint_steps}
        solver = solvers.solved(problem, outer=tx, **counts)
    state = solver.init(z, start)
    own = lambda state, batch: solver.update(state, bf.Batch(batch, batch))[0]
    results["ours"] = step_cost(own, state, batch)
    log(f"{'ours':12s} {line(results['ours'])}")
    return results


def _plain_step(loss: Loss, tx: optax.GradientTransformation) -> Callable:
    def step(carry, batch):
        x, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(x, batch), opt_state)
        return optax.apply_updates(x, updates), opt_state

    return step


def _train(step: Callable, carry: Any, side: data.FiniteSum, config: Any) -> Any:
    """X after the run's number of steps, on the run's minibatches in the run's order."""
    batches = jax.tree.map(jnp.asarray, side.batches)
    ids = jnp.asarray(Sampler(side.num_batches, 2 * config.seed).ids(0, config.steps))

    @jax.jit
    def run(carry, ids):
        def body(carry, i):
            return step(carry, jax.tree.map(lambda leaf: leaf[i], batches)), None

        return jax.lax.scan(body, carry, ids)[0]

    return run(carry, ids)[0]
