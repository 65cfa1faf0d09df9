"""What a step, the start and a mesh cost does not grow with the number of weights.

At the published size, 1e8, `benchmarks/weights.py` measures; here the compiled programs tell.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import many_weights_mesh
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import oracles
from bilevel_flax.outer import lazy_adam, lazy_sgd

ROOT = Path(__file__).parents[2]
ROWS, BATCH = 10_000_000, 8
COUNTS = {"num_inner_batches": 2, "num_outer_batches": 2}
SOLVERS = {
    "soba": bf.soba,
    "saba": functools.partial(bf.saba, **COUNTS),
    "auto": functools.partial(bf.auto, steps=10),
}
PROBLEM = bf.Problem(
    lambda z, x, batch: (
        jnp.mean(jax.nn.sigmoid(x["w"]) * (batch["a"] @ z - 1) ** 2)
        + jnp.exp(x["p"]) * jnp.sum(z**2)
    ),
    lambda z, x, batch: jnp.mean((batch["a"] @ z) ** 2),
    per_sample={"w": True, "p": False},
)


def make(name, optimiser):
    return SOLVERS[name](PROBLEM, inner=optax.sgd(0.1), outer=optimiser)


def start(rows):
    return jnp.zeros(3), {"w": jnp.zeros(rows), "p": jnp.float32(0.0)}


def shapes(rows):
    return jax.eval_shape(lambda: start(rows))


def per_row(tree, rows):
    """Bytes for each row in the leaves that have one entry for each."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.shape[:1] == (rows,)]
    return sum(leaf.dtype.itemsize * leaf.size for leaf in leaves) / rows


def compiled(function, *args, donated=0):
    lowered = jax.jit(function, donate_argnums=donated).lower(*args)
    return lowered.compile()


@pytest.mark.parametrize(
    ("name", "optimiser", "bytes_a_row"),
    [(name, lazy_adam(0.1), 16) for name in SOLVERS] + [("soba", lazy_sgd(0.1), 4)],
    ids=[*SOLVERS, "soba_sgd"],
)
def test_a_step_touches_its_rows_only(name, optimiser, bytes_a_row):
    solver = make(name, optimiser)
    state = jax.eval_shape(solver.init, *shapes(ROWS))
    # The weights; Adam's two moments and its count of visits. No estimator memory.
    assert per_row(state, ROWS) == bytes_a_row
    side = {
        "a": jax.ShapeDtypeStruct((BATCH, 3), jnp.float32),
        "index": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    one = jax.ShapeDtypeStruct((), jnp.int32)
    step = compiled(solver.update, state, bf.Batch(side, side, one, one))
    memory = step.memory_analysis()
    assert memory.temp_size_in_bytes < 100_000
    # All that is as long as the table lives where it lived before.
    assert memory.alias_size_in_bytes >= bytes_a_row * ROWS
    assert not re.findall(rf"\[{ROWS}\]\S* copy\(", step.as_text())


def test_the_start_takes_over_the_weights_if_they_are_donated():
    solver = make("soba", lazy_adam(0.1))
    init = compiled(solver.init, *shapes(ROWS), donated=1)
    memory = init.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * ROWS
    assert memory.temp_size_in_bytes < 100_000
    z, x = start(1000)
    state = jax.jit(solver.init, donate_argnums=1)(z, x)
    assert x["w"].is_deleted()
    batch = {"a": jnp.ones((BATCH, 3)), "index": jnp.arange(BATCH)}
    jax.jit(solver.update, donate_argnums=0)(state, bf.Batch(batch, batch))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_the_table_its_moments_and_its_counts():
    command = [sys.executable, str(ROOT / "benchmarks" / "weights.py"), "--memory-of", "50000000"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["needed"] == 16 * 50_000_000
    assert found["resident"] < 1.1 * found["needed"]
    assert found["peak"] < 1.1 * found["needed"]


def test_under_saba_a_row_moves_by_its_own_cross_term():
    """Nothing is memorised of it, and nothing needs to be: no other minibatch has the row."""
    solver = make("saba", lazy_sgd(0.1))
    z, x = start(4 * BATCH)
    state = solver.init(z, x)
    update = jax.jit(solver.update)
    cross_jvp = jax.jit(functools.partial(oracles.cross_jvp, PROBLEM))
    rng = np.random.default_rng(0)
    sides = [
        {
            "a": jnp.asarray(rng.normal(size=(BATCH, 3)), jnp.float32),
            "index": jnp.asarray(rng.permutation(4 * BATCH)[:BATCH]),
        }
        for _ in range(2)
    ]
    for step in range(4):
        i = jnp.int32(step % 2)
        batch = bf.Batch(sides[step % 2], sides[0], i, i)
        cross = cross_jvp(state.variables, batch.inner)["w"]
        before = state.outer_params["w"]
        state, info = update(state, batch)
        bf.check_finite(info)
        expected = before.at[cross.index].add(-0.1 * cross.values)
        np.testing.assert_allclose(state.outer_params["w"], expected, rtol=1e-6, atol=1e-9)
    assert float(jnp.abs(cross.values).max()) > 1e-4


@pytest.fixture(scope="module")
def on_eight_devices():
    return many_weights_mesh.measured()


def test_on_a_mesh_each_device_keeps_its_rows(on_eight_devices):
    rows = 80_000
    for name, found in on_eight_devices.items():
        assert found["apart"] < 1e-6, name
        # 16 bytes a row and little else; what is sent is of the size of minibatch and network.
        assert found["arguments"] < 1.1 * 16 * rows / 8, name
        assert found["temporary"] < 20_000, name
        assert found["largest"] < 1000 < 4 * rows / 8, name


def test_microbatches_are_reduced_once(on_eight_devices):
    shared, split = (on_eight_devices[f"soba {name}"] for name in ("shared", "microbatches"))
    assert (split["times"], split["bytes"]) == (shared["times"], shared["bytes"])
