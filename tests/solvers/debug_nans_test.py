"""Every method under `jax_debug_nans`: nothing that a step hands on is a NaN where all is well."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.solvers import table

COUNTS = {"num_inner_batches": 2, "num_outer_batches": 2}
SERIES = {"adjoint_steps": 2, "adjoint_step": 0.1}
SETTINGS = {
    "auto": {"steps": 9, "update_every": 2, "adjoint_update_every": 2},
    "first_order": {"steps": 9},
    "saba": COUNTS,
    "srba": COUNTS | {"period": 2},
    "spaba": COUNTS | {"probability": 0.5},
    "masoba": {"theta": 0.3},
    "storm": {"eta": 0.3},
    "fsla": {"eta": 0.3},
    "amigo": {"inner_steps": 2, "adjoint_steps": 2},
    "stocbio": {"inner_steps": 2, **SERIES},
    "bsa": {"inner_steps": 2, **SERIES},
    "ttsa": SERIES,
    "mrbo": SERIES,
    "sustain": SERIES,
    "vrbo": {"inner_steps": 2, "period": 2, **SERIES, **COUNTS},
    "f2sa": {"inner_steps": 2, "penalty": 10.0},
    "bsg": {"inner_steps": 2, "adjoint_steps": 2},
    "bsgo": {"inner_steps": 2, "adjoint_steps": 2},
    "implicit": {"inner_steps": 2, "adjoint_steps": 2},
    "unrolled": {"inner_steps": 2},
}
PROBLEM = bf.Problem(
    lambda z, x, batch: 0.5 * jnp.mean((z - x * batch) ** 2),
    lambda z, x, batch: 0.5 * jnp.mean((z - batch) ** 2) + 0.05 * jnp.sum(x**2),
)
DATA = jnp.arange(6.0).reshape(2, 3)
SGD = optax.sgd(0.1)


@pytest.fixture
def debug_nans():
    with jax.debug_nans(True):
        yield


@pytest.mark.usefixtures("debug_nans")
@pytest.mark.parametrize("name", [row.name for row in table.ROWS])
def test_five_steps_hand_on_no_nan(name):
    optimisers = {"inner": SGD, "outer": SGD}
    if name == "inner_only":
        del optimisers["outer"]
    solver = table.method(name)(PROBLEM, **optimisers, **SETTINGS.get(name, {}))
    state = solver.init(jnp.zeros(3), jnp.ones(3))
    fast = {"xla_backend_optimization_level": 0}
    update = jax.jit(solver.update, compiler_options=fast)
    refresh = jax.jit(solver.refresh, compiler_options=fast)

    def minibatch(step, count):
        ids = (step + np.arange(count)) % 2
        ids = ids if solver.batches != (1, 1) else ids[0]
        return DATA[ids], ids

    for step in range(5):
        while solver.next_refresh(state) <= state.step:
            i = int(solver.refresh_cursor(state)) % 4
            side = {"inner": DATA[i], "inner_id": i} if i < 2 else None
            state = refresh(state, bf.Batch(**(side or {"outer": DATA[i - 2], "outer_id": i - 2})))
        (inner, i), (outer, j) = (minibatch(step, count) for count in solver.batches)
        state, info = update(state, bf.Batch(inner, outer, i, j))
        assert bool(info.ok)
    assert int(state.step) == 5
    for leaf in jax.tree.leaves((state, info)):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()


def test_srba_moves_nothing_before_its_pass_or_in_it():
    solver = bf.srba(PROBLEM, inner=SGD, outer=SGD, **SETTINGS["srba"])
    start = solver.init(jnp.zeros(3), jnp.ones(3))
    batch = bf.Batch(DATA[0], DATA[1], 0, 1)
    for state in (start, solver.refresh(start, bf.Batch(inner=DATA[0], inner_id=0))):
        after, info = solver.update(state, batch)
        assert not info.finite and int(after.step) == 0
        np.testing.assert_array_equal(after.inner_params, start.inner_params)
