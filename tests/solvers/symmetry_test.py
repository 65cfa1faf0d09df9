"""Losses whose gradient is none, and losses that only look like it."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_flax as bf
from bilevel_flax.diagnostics import check_symmetry, hypergradient_check

stop = jax.lax.stop_gradient
RNG = np.random.default_rng(0)
A = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(3, size=6))
MATRIX = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)


@jax.custom_vjp
def reverse(value):
    return value


reverse.defvjp(lambda value: (value, None), lambda _, grad: (-grad,))


def straight_through(value):
    return value + stop(jnp.round(value) - value)


def cross_entropy(w):
    logs = jax.nn.log_softmax(A.astype(w.dtype) @ w)
    return -jnp.take_along_axis(logs, LABELS[:, None], 1).mean().astype(jnp.float32)


def walk(z, x):
    def body(total, row):
        return total + x * (1 + 0.9 * stop(row @ z) - (row**2) @ z) ** 2, None

    return jax.lax.scan(body, jnp.float32(0), A)[0]


FALSE = {
    "temporal difference, one parameter": (
        lambda z, x, _: 0.5 * (1.0 + jax.nn.sigmoid(x) * stop(z) - z) ** 2,
        jnp.array(0.3),
    ),
    "temporal difference under jit": (
        lambda z, x, _: x * jax.jit(lambda z: jnp.sum((1 + stop(A[:-1] @ z) - A[1:] @ z) ** 2))(z),
        jnp.ones(4),
    ),
    "temporal difference in a scan": (lambda z, x, _: walk(z, x), jnp.ones(4)),
    "rounded weights": (
        lambda z, x, _: x * jnp.sum((A @ straight_through(z)) ** 3),
        jnp.full(4, 1.3),
    ),
    "gradient reversal": (
        lambda z, x, _: x * jnp.sum(reverse(z["f"]) * z["d"]) + 0.5 * jnp.sum(z["f"] ** 2),
        {"f": jnp.ones(3), "d": jnp.arange(3.0)},
    ),
}
RIGHT = {
    "softmax": (lambda z, x, _: cross_entropy(z) + x * jnp.sum(z**2), MATRIX),
    "in bfloat16": (lambda z, x, _: x * cross_entropy(z.astype(jnp.bfloat16)), MATRIX),
    "logsumexp": (lambda z, x, _: x * jax.nn.logsumexp(A @ z) ** 2, jnp.ones(4)),
    "stopped statistics": (lambda z, x, _: x * jnp.sum((A @ z - stop(A.mean())) ** 2), jnp.ones(4)),
    "a log by callback, without a derivative": (
        lambda z, x, _: (
            x * jnp.sum((A @ z) ** 2) + 0 * jax.pure_callback(np.float32, x, stop(jnp.sum(z)))
        ),
        jnp.ones(4),
    ),
    "stopped x": (lambda z, x, _: x * jnp.sum((A @ z - stop(x)) ** 2), jnp.ones(4)),
    "rounded data": (lambda z, x, _: x * jnp.sum((straight_through(A) @ z) ** 2), jnp.ones(4)),
    "rectified, recomputed": (
        lambda z, x, _: x * jax.checkpoint(lambda z: jax.nn.relu(A @ z).sum() ** 2)(z),
        jnp.ones(4),
    ),
    "other leaves": (
        lambda z, x, _: x * jnp.sum((A @ z["w"]) ** 2),
        {"w": jnp.ones(4), "n": jnp.arange(3)},
    ),
}


def checked(loss, z):
    problem = bf.Problem(loss, lambda z, x, _: jnp.float32(0))
    return check_symmetry(problem, bf.Variables(z, z, jnp.array(0.5)), None)


@pytest.mark.parametrize("name", FALSE)
def test_what_is_no_gradient_is_named(name: str):
    with pytest.warns(UserWarning, match="reversal" if "reversal" in name else "stop_gradient"):
        assert not checked(*FALSE[name]).ok


@pytest.mark.parametrize("name", RIGHT)
def test_what_only_looks_like_it_is_not(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(*RIGHT[name]).ok


def test_the_hypergradient_check_says_so():
    loss, z = FALSE["temporal difference, one parameter"]
    problem = bf.Problem(loss, lambda z, x, _: 0.5 * (z - 1.0) ** 2)
    with pytest.warns(UserWarning, match="belong to another problem"):
        found = hypergradient_check(problem, bf.Variables(z, z, jnp.array(0.5)), 0.0, 0.0)
    assert not found.symmetry.ok
