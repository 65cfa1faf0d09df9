"""One line each from a loop of one's own: any solver's state, the network alone, a warm start."""

import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bilevel_flax as bf
from bilevel_flax.checkpoints import CheckpointError, CheckpointMismatch, arrays_file, format


def problem() -> bf.Problem:
    return bf.Problem(
        lambda z, x, batch: jnp.sum((z["w"] - x["rate"]) ** 2),
        lambda z, x, batch: jnp.sum((z["w"] - 3.0) ** 2),
    )


POINT = ({"w": jnp.arange(3.0)}, {"rate": jnp.full(3, 0.5)})
ZEROS = jax.tree.map(jnp.zeros_like, POINT)


def moved(state: Any) -> Any:
    """A state in which no two leaves, and no two elements, are alike."""
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        structure,
        [
            leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.asarray(
                rng.integers(0, 2 if leaf.dtype == bool else 100, leaf.shape), leaf.dtype
            )
            for leaf in leaves
        ],
    )


def assert_same(state: Any, other: Any) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert one.dtype == two.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


SOLVERS = {
    "soba": bf.soba,
    "saba": partial(bf.saba, num_inner_batches=4, num_outer_batches=2),
    "srba": partial(bf.srba, num_inner_batches=4, num_outer_batches=2, period=3),
    "storm": bf.storm,
    "amigo": bf.amigo,
    "stocbio": partial(bf.stocbio, adjoint_step=0.1),
    "f2sa": bf.f2sa,
    "mrbo": partial(bf.contrib.mrbo, adjoint_step=0.1),
    "masoba": bf.contrib.masoba,
    "vrbo": partial(
        bf.contrib.vrbo, adjoint_step=0.1, num_inner_batches=4, num_outer_batches=2, period=3
    ),
}


def make(name: str, inner: Any = None) -> bf.BilevelSolver:
    inner = optax.adam(0.1) if inner is None else inner
    return SOLVERS[name](problem(), inner=inner, outer=optax.adam(0.1))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_state_of_any_solver_in_one_line_each_and_by_orbax_alone(name: str, tmp_path: Path):
    solver = make(name)
    state = moved(solver.init(*POINT, rng=jax.random.key(3)))
    bf.checkpoints.save(tmp_path / "ours", 5, state, {"epoch": 1})
    assert bf.checkpoints.latest_step(tmp_path / "ours") == 5
    template = solver.init(*ZEROS, rng=jax.random.key(0))
    assert_same(bf.checkpoints.restore(tmp_path / "ours", template), state)
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(tmp_path / "orbax", state)
    with ocp.StandardCheckpointer() as orbax:
        assert_same(orbax.restore(tmp_path / "orbax", template), state)


def test_z_v_and_x_are_items_that_orbax_alone_reads(tmp_path: Path):
    state = moved(make("soba").init(*POINT, model_state={"mean": jnp.ones(2)}))
    state = state.replace(outer_params=jnp.arange(4.0))  # a bare array
    bf.checkpoints.save(tmp_path, 1, state, {"lr": 0.1})
    read = ocp.StandardCheckpointer().restore
    np.testing.assert_array_equal(read(tmp_path / "1/inner_params")["w"], state.inner_params["w"])
    np.testing.assert_array_equal(read(tmp_path / "1/adjoint")["w"], state.adjoint["w"])
    np.testing.assert_array_equal(read(tmp_path / "1/outer_params")["value"], np.arange(4))
    np.testing.assert_array_equal(
        read(tmp_path / "1/model_state")["mean"], state.model_state["mean"]
    )
    with ocp.CheckpointManager(tmp_path, item_names=("inner_params", "meta")) as manager:
        args = ocp.args.Composite(
            inner_params=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
        )
        items = manager.restore(1, args=args)
    assert items.meta == {"lr": 0.1}
    np.testing.assert_array_equal(items.inner_params["w"], state.inner_params["w"])


def test_the_network_alone_as_flax_has_it(tmp_path: Path):
    network = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    variables = network.init(jax.random.key(0), jnp.ones((1, 4)))
    z, statistics = variables["params"], variables["batch_stats"]
    z["half.precise/leaf"] = jnp.ones(2, jnp.bfloat16)  # a name that no path holds
    state = make("soba").init(*POINT)
    state = state.replace(inner_params=z, model_state=statistics)
    bf.checkpoints.save(tmp_path, 1, state)
    assert_same(bf.checkpoints.restore_inner(tmp_path), z)
    assert_same(bf.checkpoints.restore_inner(tmp_path, like=jax.eval_shape(lambda: z)), z)
    parts = bf.checkpoints.restore_parts(tmp_path, {"inner_params": z, "model_state": None})
    assert_same(parts, {"inner_params": z, "model_state": statistics})


def test_a_bare_array_is_a_network_too(tmp_path: Path):
    bf.checkpoints.save(tmp_path, 1, {"inner_params": jnp.arange(3), "rng": jax.random.key(1)})
    np.testing.assert_array_equal(bf.checkpoints.restore_inner(tmp_path), np.arange(3))
    key = bf.checkpoints.restore_parts(tmp_path, {"rng": None})["rng"]
    assert jnp.array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(1)))


def test_a_warm_start_under_another_solver_and_optimiser(tmp_path: Path):
    state = moved(make("saba").init(*POINT))
    bf.checkpoints.save(tmp_path, 9, state)
    other = make("srba", inner=optax.sgd(0.1))
    warm = bf.checkpoints.warm_start(tmp_path, other, *ZEROS, rng=jax.random.key(8))
    # All that a fresh state derives from z and x (previous points, slow weights) is of these.
    expected = other.init(state.inner_params, state.outer_params, rng=jax.random.key(8))
    assert_same(warm, expected)
    assert int(warm.step) == 0


def test_what_does_not_fit_is_named_in_one_line(tmp_path: Path):
    state = make("soba").init(*POINT)
    bf.checkpoints.save(tmp_path, 1, state)
    wider = {"w": jnp.ones(4)}
    cases = [
        (
            lambda: bf.checkpoints.restore_inner(tmp_path, like=wider),
            r"'inner_params.w'.*float32\[4",
        ),
        (lambda: bf.checkpoints.restore_parts(tmp_path, {"model_state": None}), "no 'model_state'"),
        (lambda: bf.checkpoints.restore(tmp_path, make("saba").init(*POINT)), "estimator_state"),
        (
            lambda: bf.checkpoints.restore(tmp_path, make("soba", optax.sgd(0.1)).init(*POINT)),
            "inner_opt_state",
        ),
        (
            lambda: bf.checkpoints.restore_inner(tmp_path, like={"w": jnp.ones(3, jnp.bfloat16)}),
            "bfloat16",
        ),
    ]
    for call, message in cases:
        with pytest.raises(CheckpointMismatch, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    for call in (bf.checkpoints.restore_inner, lambda d: bf.checkpoints.restore(d, state)):
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            call(tmp_path / "elsewhere")
    assert bf.checkpoints.latest_step(tmp_path / "elsewhere") is None
    assert not (tmp_path / "elsewhere").exists()


def test_the_final_file_of_a_run_is_read_alike(tmp_path: Path):
    parts = {"inner_params": POINT[0], "outer_params": POINT[1]}
    arrays_file.write(tmp_path / "network.npz", parts, {"step": 3})
    assert_same(bf.checkpoints.restore_inner(tmp_path / "network.npz"), POINT[0])
    warm = bf.checkpoints.warm_start(tmp_path / "network.npz", make("soba"), *ZEROS)
    assert_same(warm, make("soba").init(*POINT))
    with pytest.raises(CheckpointMismatch, match="has no 'model_state'"):
        bf.checkpoints.restore_parts(tmp_path / "network.npz", {"model_state": None})
    (tmp_path / "network.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        bf.checkpoints.restore_inner(tmp_path / "network.npz")


def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for step in (1, 2):
        bf.checkpoints.save(tmp_path, step, {"inner_params": jnp.full(2, step)})
    (tmp_path / "2" / "checksums" / "metadata").write_text("")
    assert bf.checkpoints.restore_inner(tmp_path).tolist() == [1, 1]
    assert "step 2 is damaged" in caplog.text and (tmp_path / "2").exists()


_WITHOUT_ORBAX = """
    import sys
    sys.modules["orbax"] = sys.modules["etils"] = None
    import bilevel_flax as bf
    assert "orbax.checkpoint" not in sys.modules
    for use in (bf.checkpoints.restore_inner, bf.checkpoints.Checkpointer):
        try:
            use("nowhere")
        except bf.checkpoints.CheckpointError as error:
            print(error)
"""


def test_without_orbax_one_line_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WITHOUT_ORBAX)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("pip install 'bilevel-flax[train]'" in line for line in lines)


def test_an_orbax_that_was_not_tested_is_named_once(monkeypatch: pytest.MonkeyPatch):
    format.orbax.cache_clear()
    monkeypatch.setattr(ocp, "__version__", "0.99.1")
    with pytest.warns(UserWarning, match=r"orbax-checkpoint 0\.99\.1 .*0\.12") as caught:
        format.orbax()
        format.orbax()
    assert len(caught) == 1
    format.orbax.cache_clear()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        format.orbax()
