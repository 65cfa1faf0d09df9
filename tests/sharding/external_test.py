"""A host's shardings, whatever its mesh and its scanned axis are, are taken over as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevel_flax as bf
from bilevel_flax.solvers.saba import estimator as saba_estimator

SPECS = {"scanned": PartitionSpec("model", None, "stage"), "scale": PartitionSpec()}


def inner_loss(z, x, batch):
    layers = jnp.moveaxis(z["scanned"], 1, 0)  # param_scan_axis=1
    out, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch["a"], layers)
    values = jnp.mean(out, -1) * z["scale"]
    return jnp.mean(jax.nn.sigmoid(x) * (values - batch["b"]) ** 2)


def outer_loss(z, x, batch):
    return inner_loss(z, jnp.zeros(len(batch["b"])), batch)


PROBLEM = bf.Problem(inner_loss, outer_loss, per_sample=True)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (2, 2), ("stage", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )


def z_of(mesh=None):
    rng = np.random.default_rng(0)
    z = {"scanned": rng.normal(size=(4, 3, 4)), "scale": np.ones(())}
    z = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), z)
    if mesh is None:
        return z
    return {name: jax.device_put(z[name], NamedSharding(mesh, SPECS[name])) for name in z}


def batch(i):
    rng = np.random.default_rng(i)
    side = {"a": rng.normal(size=(4, 4)), "b": rng.normal(size=4)}
    side = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), side)
    return bf.Batch({**side, "index": jnp.arange(4) + 4 * i}, side, i, i)


def test_v_tables_and_moments_lie_as_the_hosts_z(mesh):
    z, x = z_of(mesh), jnp.zeros(8)
    host = bf.directions(PROBLEM, saba_estimator(PROBLEM, 2, 2))
    shardings = bf.sharding.state_shardings(
        jax.eval_shape(host.init, z, x), mesh, jax.tree.map(lambda leaf: leaf.sharding, z), PROBLEM
    )
    state = jax.jit(host.init, out_shardings=shardings)(z, x)
    assert state.adjoint["scanned"].sharding.spec == SPECS["scanned"]
    table = state.estimator_state.inner.table.rows.hvp["scanned"]
    assert table.sharding.spec == PartitionSpec(None, *SPECS["scanned"])
    assert state.outer_params.sharding.spec == PartitionSpec(("stage", "model"))

    step = jax.jit(host, in_shardings=(shardings, None))
    alone = host.init(z_of(), x)
    for i in range(2):
        found, expected = step(state, batch(i)), jax.jit(host)(alone, batch(i))
        state, alone = found.state, expected.state
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
            found.directions,
            expected.directions,
        )


def test_without_a_jit_they_do_too(mesh):
    solver = bf.soba(PROBLEM, inner=optax.adam(0.1), outer=optax.sgd(0.1))
    state = solver.init(z_of(mesh), jnp.zeros(8))
    moments = state.inner_opt_state[0].mu, state.adjoint_opt_state[0].nu
    for tree in (state.inner_params, state.adjoint, *moments):
        assert tree["scanned"].sharding.spec == SPECS["scanned"]


def test_a_mesh_of_others_is_refused(mesh):
    z = z_of(mesh)
    own = jax.tree.map(lambda leaf: leaf.sharding, z)
    with pytest.raises(ValueError, match=r"lie on a mesh \{'stage': 2, 'model': 2\}, but mesh= is"):
        bf.sharding.param_specs(z, bf.sharding.make_mesh("data=1", jax.devices()[:1]), own)


def test_rows_are_not_looked_up_over_explicit_axes():
    """JAX's default for a mesh; its own error names a gather inside of the library."""
    explicit = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    cut = NamedSharding(explicit, PartitionSpec("data"))
    solver = bf.soba(PROBLEM, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
    state = solver.init(z_of(), jnp.zeros(8))
    at, data = (
        jax.device_put(tree, where)
        for tree, where in ((state, NamedSharding(explicit, PartitionSpec())), (batch(0)[:2], cut))
    )
    with pytest.raises(ValueError, match=r"over Explicit axes of a mesh .* bf.sharding.make_mesh"):
        jax.jit(solver.update)(at, bf.Batch(*data))
