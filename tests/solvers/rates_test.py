"""The published rates, one-sided: SOBA's t^-1/2 with steps that shrink, SABA's 1/t with constant.

What is measured is the slope of log inf_{s <= t} ‖∇h(x_s)‖² against log t, averaged over seeds.
x has 24 coordinates: in a few, a walk at random comes close to the solution now and then, and the
infimum would fall without any progress (as t^-2/dimension).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import quadratics

import bilevel_flax as bf

LENGTH, SEEDS, DIMENSION = 8192, 6, 24


@functools.cache
def data():
    return quadratics(
        num_inner=6, num_outer=5, inner_shapes={"w": (5,)}, outer_shapes={"u": (DIMENSION,)}
    )


def shrinking(size):
    return optax.sgd(lambda t: size * (t + 1.0) ** -0.5)


def slope(solver) -> float:
    """Of log inf ‖∇h‖² against log t, between LENGTH / 64 and LENGTH steps."""
    found = data()
    at = lambda u: np.asarray(found.grad_h({"u": u})["u"])
    zero = np.zeros(DIMENSION)
    offset = jnp.asarray(at(zero))
    hessian = jnp.asarray(np.stack([at(zero + e) - at(zero) for e in np.eye(DIMENSION)], 1))
    start = solver.init(found.inner_params, found.outer_params)

    def body(carry, key):
        state, least = carry
        i, j = jax.random.randint(key, (2,), 0, jnp.array([found.num_inner, found.num_outer]))
        state, _ = solver.update(state, found.batch(i, j))
        gradient = hessian @ state.outer_params["u"] + offset
        least = jnp.minimum(least, jnp.sum(gradient**2))
        return (state, least), least

    def run(key):
        carry = start, jnp.asarray(jnp.inf)
        return jax.lax.scan(body, carry, jax.random.split(key, LENGTH))[1]

    keys = jax.random.split(jax.random.PRNGKey(0), SEEDS)
    fast = {"xla_backend_optimization_level": 1}
    least = np.asarray(jax.jit(jax.vmap(run), compiler_options=fast)(keys)).mean(0)
    times = np.geomspace(LENGTH / 64, LENGTH, 25).astype(int)
    # Below 1e-26 it is rounding.
    return float(np.polyfit(np.log(times), np.log(np.maximum(least[times - 1], 1e-26)), 1)[0])


def test_sobas_rate_needs_steps_that_shrink(x64):
    found = data().problem
    assert slope(bf.soba(found, inner=shrinking(0.5), outer=shrinking(0.3))) <= -0.4
    # The measurement tells: constant steps stall.
    assert slope(bf.soba(found, inner=optax.sgd(0.3), outer=optax.sgd(0.1))) > -0.4


def test_sabas_rate_comes_with_constant_steps(x64):
    counts = {"num_inner_batches": data().num_inner, "num_outer_batches": data().num_outer}
    steps = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.03)}
    assert slope(bf.saba(data().problem, **steps, **counts)) <= -0.9
