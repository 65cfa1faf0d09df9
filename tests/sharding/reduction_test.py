"""reduction: sums over all devices, each part to those that keep it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bilevel_flax import sharding
from bilevel_flax.plan.collectives import collectives
from bilevel_flax.sharding.reduction import reduced

AXES = ("data", "fsdp")


@pytest.mark.parametrize(
    ("shape", "spec", "moved"),
    [
        # In one with the sum over `data`, whose second half gathers.
        ((16, 6), P("fsdp"), {"reduce-scatter": 1 / 8, "all-gather": 1 / 4}),
        ((6, 8), P(None, "fsdp"), {"reduce-scatter": 1 / 8, "all-gather": 1 / 4}),
        # Four rows go to no eight devices.
        ((4, 6), P("fsdp"), {"reduce-scatter": 1 / 4, "all-reduce": 1 / 4}),
        ((16, 6), P(("fsdp", "data")), {"reduce-scatter": 1 / 8}),
        ((4, 2), P("fsdp", "data"), {"reduce-scatter": 1 / 4 + 1 / 8}),
        ((5,), P(), {"all-reduce": 1}),
    ],
)
def test_a_sum_arrives_in_its_parts_and_moves_no_more_than_it_must(shape, spec, moved):
    mesh = sharding.make_mesh("data=2,fsdp=4")
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def on_share(leaf):
        mine = leaf * (1.0 + jax.lax.axis_index(AXES))
        return reduced({"like_z": [[mine]], "rest": []}, [spec], AXES)["like_z"][0][0]

    step = jax.jit(
        jax.shard_map(on_share, mesh=mesh, in_specs=P(), out_specs=spec, check_vma=False)
    )
    np.testing.assert_allclose(step(leaf), 36 * leaf, rtol=1e-5)  # 1 + ... + 8
    found = collectives(step.lower(leaf).compile().as_text())
    assert {kind: of["bytes"] / leaf.nbytes for kind, of in found.items()} == moved
