"""A deep equilibrium network: one layer, iterated until nothing changes.

    z* = tanh(W z* + U image + b)        logits = C z* + c
    W = (1 - m) I - AᵀA + B - Bᵀ

The symmetric part of I - W is at least m > 0, so there is one fixed point and
z -= α (z - tanh(...)) goes there for small α, whatever A and B are. The Jacobian I - D W is not
symmetric.

References:
    S. Bai, J. Z. Kolter, V. Koltun. Deep equilibrium models. NeurIPS 2019.
    E. Winston, J. Z. Kolter. Monotone operator equilibrium networks. NeurIPS 2020.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel_flax.checks import UserError

Weights = dict[str, jax.Array]


def init(rng: jax.Array, features: int, width: int, classes: int) -> Weights:
    """The layer's weights and the read-out's."""
    keys = jax.random.split(rng, 4)

    def normal(key, *shape):
        return jax.random.normal(key, shape) / jnp.sqrt(shape[0])

    return {
        "symmetric": 0.5 * normal(keys[0], width, width),
        "rotation": 0.5 * normal(keys[1], width, width),
        "input": normal(keys[2], features, width),
        "bias": jnp.zeros(width),
        "readout": normal(keys[3], width, classes),
        "readout_bias": jnp.zeros(classes),
    }


def recurrent(x: Weights, margin: float) -> jax.Array:
    """W, [width, width]."""
    a, b = x["symmetric"], x["rotation"]
    return (1 - margin) * jnp.eye(len(a)) - a.T @ a + b - b.T


def layer(x: Weights, margin: float, images: jax.Array):
    """`z -> tanh(W z + U image + b)`, on states [batch, width] of images [batch, features]."""
    matrix, drive = recurrent(x, margin).T, images @ x["input"] + x["bias"][None]
    return lambda z: jnp.tanh(z @ matrix + drive)


def logits(x: Weights, z: jax.Array) -> jax.Array:
    """The read-out, [batch, classes]."""
    return z @ x["readout"] + x["readout_bias"][None]


def cross_entropy(x: Weights, z: jax.Array, labels: jax.Array) -> jax.Array:
    """Of each example, [batch]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(x, z), labels)


def equilibrium(
    x: Weights, margin: float, images: jax.Array, step: float, tolerance: float, max_steps: int
) -> jax.Array:
    """The states z*, [n, width], by optimistix; for measuring, outside of any step.

    Raises:
        UserError: it did not converge; names the residual and the iteration.
    """
    z, residual, iterations = _solve(x, margin, images, step, tolerance, max_steps)
    if not float(residual) <= 10 * tolerance:
        raise UserError(
            f"the layer's fixed point did not converge: residual {float(residual):.2g} (largest "
            f"entry) at iteration {int(iterations)}, --config.tolerance={tolerance:g}: take a "
            "smaller --config.step, or more --config.max_iterations"
        )
    return z


def _solve(x: Weights, margin, images, step, tolerance, max_steps) -> Any:
    import optimistix  # pyright: ignore[reportMissingImports]  an extra, to measure

    apply = layer(x, margin, images)

    def damped(z, _):
        return z + step * (apply(z) - z)

    solver = optimistix.FixedPointIteration(
        rtol=0.0, atol=step * tolerance, norm=optimistix.max_norm
    )
    start = jnp.zeros((len(images), x["bias"].shape[0]))
    solution = optimistix.fixed_point(damped, solver, start, max_steps=max_steps, throw=False)
    z = solution.value
    return z, jnp.max(jnp.abs(apply(z) - z)), solution.stats["num_steps"]
