"""A kernel that says how it is partitioned, as cuDNN's attention does, with a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

import bilevel_flax as bf


def partitioned(function, rule):
    kernel = custom_partitioning(function)

    def partition(mesh, arguments, result):
        return mesh, function, result.sharding, tuple(each.sharding for each in arguments)

    kernel.def_partition(partition=partition, sharding_rule=rule)
    return kernel


def make_sine():
    forward = partitioned(jnp.sin, "i j -> i j")
    backward = partitioned(lambda a, c: jnp.cos(a) * c, "i j, i j -> i j")
    kernel = jax.custom_vjp(forward)
    kernel.defvjp(lambda a: (forward(a), a), lambda a, c: (backward(a, c),))
    return kernel


def test_a_partitioned_kernel_is_differentiated_twice_on_one_device_and_on_many():
    sine = bf.oracles.with_reference(make_sine(), jnp.sin)
    point = jax.random.normal(jax.random.key(0), (4, 3))

    @jax.jit
    def product(a, along):
        return jax.jvp(jax.grad(lambda a: jnp.sum(sine(a) ** 2)), (a,), (along,))[1]

    right = 2 * np.cos(2 * point) * np.cos(point)  # (sin²)'' = 2 cos 2a
    np.testing.assert_allclose(product(point, jnp.cos(point)), right, rtol=1e-6, atol=1e-6)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.device_put(point, NamedSharding(mesh, PartitionSpec("data")))
    found = product(rows, jnp.cos(rows))
    np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)
    assert found.sharding.spec[0] == "data"
    assert "all-gather" not in product.lower(rows, rows).compile().as_text()


def test_probe_does_not_blame_the_partitioning():
    sine = bf.oracles.with_reference(make_sine(), jnp.sin)
    loss = lambda z, x, batch: jnp.sum(sine(z) ** 2) * x + batch
    point = bf.Variables(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones(()))
    found = bf.oracles.probe(bf.Problem(loss, loss), point, jnp.zeros(()))
    assert found.mode == "forward_over_reverse" and not any(found.stopped_by.values())
