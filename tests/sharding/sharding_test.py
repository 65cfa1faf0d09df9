"""One state on many devices: where its parts lie, that steps are the same, what they send.

The whole matrix of models, methods and meshes is in sharding_matrix_test.py (slow).
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from sharding_problems import RULES, largest_difference, run, setting, solver

import bilevel_flax as bf
from bilevel_flax import sharding
from bilevel_flax.plan.collectives import collectives
from bilevel_flax.sharding.sketch import sketch

MESH = AbstractMesh((2, 4, 1), sharding.AXES)


def test_a_line_of_text_makes_a_mesh():
    assert sharding.mesh_shape(" fsdp=4, data=2 ") == {"data": 2, "fsdp": 4, "tensor": 1}
    mesh = sharding.make_mesh("data=4,tensor=2")
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == (4, 1, 2)
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data=3", "3 devices, but there are 8"),
        ("data=16", "16 devices, but there are 8"),
        ("model=8", 'the axis "model"'),
        ("data=8,data=1", '"data" twice'),
        ("data=0", 'the size "0"'),
        ("data", 'the size ""'),
        ("data=two", 'the size "two"'),
        ("", 'the axis ""'),
    ],
)
def test_a_mesh_that_cannot_be(text: str, says: str):
    with pytest.raises(ValueError, match=says) as error:
        sharding.make_mesh(text)
    assert "\n" not in str(error.value)


def wide(rows=None, **more):
    """Shapes of a state with a matrix, a vector, and weights of examples."""
    z = {"layer": {"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)}, "out": jnp.zeros(1000)}
    x = {"weights": jnp.zeros(rows or 80), "penalty": jnp.zeros(())}
    problem = bf.Problem(
        lambda z, x, b: jnp.zeros(()),
        lambda z, x, b: jnp.zeros(()),
        per_sample={"weights": True, "penalty": False},
    )
    made = bf.saba(
        problem,
        inner=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        outer=bf.outer.lazy_adam(0.1),
        num_inner_batches=3,
        num_outer_batches=2,
    )
    return jax.eval_shape(made.init, z, x), problem


def test_everything_that_belongs_to_z_lies_where_z_lies():
    state, problem = wide()
    specs = sharding.state_specs(state, MESH, [("kernel", ("fsdp", None))], problem)
    kernel = lambda tree: tree["layer"]["kernel"]
    assert kernel(specs.inner_params) == kernel(specs.adjoint) == P("fsdp", None)
    adam = specs.adjoint_opt_state[1][0]
    assert kernel(adam.mu) == kernel(adam.nu) == P("fsdp", None) and adam.count == P()
    tables = specs.estimator_state
    assert kernel(tables.inner.table.rows.hvp) == P(None, "fsdp", None)
    assert kernel(tables.outer.table.rows.outer_grad_inner) == P(None, "fsdp", None)
    assert kernel(tables.inner.mean.inner_grad) == P("fsdp", None)
    assert specs.inner_params["out"] == specs.step == specs.rng == P()


def test_weights_of_examples_lie_on_all_devices():
    state, problem = wide()
    specs = sharding.state_specs(state, MESH, None, problem)
    everywhere = P(sharding.AXES)
    moments = specs.outer_opt_state.by_row["weights"].rows
    assert specs.outer_params["weights"] == moments.count == moments.mean == everywhere
    assert specs.outer_params["penalty"] == P()


def test_rows_that_the_devices_do_not_divide_stay_whole(caplog: pytest.LogCaptureFixture):
    state, problem = wide(rows=81)
    specs = sharding.state_specs(state, MESH, None, problem)
    assert specs.outer_params["weights"] == P()
    assert "81 rows" in caplog.text


def test_by_default_fsdp_cuts_the_largest_axis_that_it_divides():
    z = {"a": jnp.zeros((64, 128)), "b": jnp.zeros((128, 50)), "c": jnp.zeros((9, 7, 31))}
    specs = sharding.param_specs(z | {"small": jnp.zeros((8, 8))}, MESH)
    assert specs == {"a": P(None, "fsdp"), "b": P("fsdp"), "c": P(), "small": P()}


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([("kernels", "fsdp")], "'kernels' matches no leaf.*layer/bias"),
        ([("kernel", "fsdp"), ("layer/kernel", "-")], "'layer/kernel' matches no leaf"),
        ([("kernel", "rows")], "mesh axis 'rows'"),
        ([("out", "fsdp"), ("bias|kernel", "fsdp,-,-")], "at most one entry for each axis"),
        ([("kernel(", "fsdp")], "no regular expression"),
        (["kernel"], "a pair"),
    ],
)
def test_rules_that_cannot_be(rules, says: str):
    state, problem = wide()
    with pytest.raises(ValueError, match=says) as error:
        sharding.state_shardings(state, MESH, rules, problem)
    assert "\n" not in str(error.value)


def test_a_size_that_the_mesh_does_not_divide_is_named():
    with pytest.raises(ValueError, match="the sharding of w is .* size 6, which the 4 devices"):
        sharding.param_specs({"w": jnp.zeros((6, 5))}, MESH, [("w", "fsdp")])


def test_a_minibatch_that_the_devices_do_not_divide_is_named():
    batch = bf.Batch({"image": jnp.zeros((12, 3))}, {"image": jnp.zeros((16, 3))})
    with pytest.raises(ValueError, match="batch.inner/image holds 12 .* multiple of 8"):
        sharding.batch_shardings(batch, MESH)
    fine = sharding.batch_shardings(batch._replace(inner=None), MESH)
    assert fine.outer["image"].spec == P(("data", "fsdp"))


class Annotated(nn.Module):
    axes: tuple
    box: type

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        make = nn.with_partitioning if self.box is nn.Partitioned else nn.with_logical_partitioning
        return nn.Dense(32, kernel_init=make(init, self.axes))(x)


def test_a_linen_models_own_metadata_decides():
    z = jax.eval_shape(
        Annotated(("fsdp", None), nn.Partitioned).init, jax.random.key(0), jnp.zeros((1, 16))
    )["params"]
    specs = sharding.param_specs(z, MESH)
    assert jax.tree.leaves(specs["Dense_0"]["kernel"]) == [P("fsdp", None)]
    unboxed = sharding.param_specs(nn.unbox(z), MESH, nn.get_partition_spec(z))
    assert unboxed["Dense_0"]["kernel"] == P("fsdp", None)


def test_logical_axes_need_a_rule_each():
    z = jax.eval_shape(
        Annotated(("embed", "mlp"), nn.LogicallyPartitioned).init,
        jax.random.key(0),
        jnp.zeros((1, 16)),
    )["params"]
    rules = [("embed", None), ("mlp", "fsdp")]
    (spec,) = jax.tree.leaves(sharding.param_specs(z, MESH, rules)["Dense_0"]["kernel"])
    assert spec == P(None, "fsdp")
    with pytest.raises(ValueError, match="logical axis 'mlp'"):
        sharding.param_specs(z, MESH, rules[:1])


def test_a_sketch_is_linear_and_as_long_as_its_vector():
    vectors = [np.random.default_rng(i).normal(size=70_000) for i in range(40)]
    one, two = (jnp.asarray(vector) for vector in vectors[:2])
    cut = lambda vector: {"a": vector[:1000], "b": vector[1000:]}
    whole = sketch(cut(one))
    assert len(whole) == 70_000 // 64
    np.testing.assert_allclose(
        whole, sketch(cut(one - two)) + sketch(cut(two)), rtol=1e-3, atol=1e-3
    )
    jitted = jax.jit(sketch)
    squares = [float(jnp.sum(jitted(jnp.asarray(v)) ** 2) / np.sum(v**2)) for v in vectors]
    assert abs(np.mean(squares) - 1) < 0.03  # √(2 / 1093 / 40) is 0.7 %
    assert np.std(squares) < 0.1
    short = jnp.arange(200.0)
    np.testing.assert_array_equal(sketch(short), short)  # as it is: its length is exact


def test_steps_on_a_mesh_are_the_steps_of_one_device():
    one = run("plain", "soba", None)
    many = run("plain", "soba", "data=2,fsdp=4")
    assert largest_difference(one.state, many.state) < 1e-6
    assert many.traces == 1 and not many.not_donated
    assert abs(many.info.inner_loss - one.info.inner_loss) < 1e-5
    # A sketch of ∇₁F: the residual is an estimate.
    assert abs(many.info.adjoint_residual / one.info.adjoint_residual - 1) < 0.6


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("data=8", None),
        ("data=2,fsdp=4", None),
        ("data=2,fsdp=2,tensor=2", [("first", "fsdp,tensor"), ("second", "tensor,fsdp")]),
    ],
)
def test_first_order_steps_on_a_mesh_are_the_steps_of_one_device(x64, mesh, rules):
    many = run("plain", "first_order", mesh, steps=4, rules=rules)
    assert largest_difference(first_order_alone().state, many.state) < 1e-6
    assert many.traces == 1 and not many.not_donated


DECAYED = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.05, 0.9))
STARTS = {
    "auto": functools.partial(bf.auto, inner=optax.adam(0.05), steps=100),
    "first_order": functools.partial(bf.first_order, inner=optax.adam(0.05), steps=100),
    "decay": functools.partial(bf.auto, inner=DECAYED, steps=100),  # the residual is H + λI's
    "two points": functools.partial(
        bf.storm,
        inner=DECAYED,
        outer=bf.outer.lazy_sgd(0.1),
        adjoint=bf.adjoint.self_damped(optax.sgd(0.05)),
    ),
}


@pytest.mark.parametrize("method", STARTS)
def test_v_leaves_zero_on_a_mesh_as_on_one_device(x64, method):
    """V starts so small that ∇₁F leaves no digit of Hv, which its first steps are scaled by."""
    a = np.random.default_rng(3).normal(size=(8, 5))
    batch = {"a": a, "y": a.sum(1), "index": np.arange(8)}

    def residuals(z, batch):
        return (jnp.tanh(batch["a"] @ z) - batch["y"]) ** 2

    problem = bf.Problem(
        lambda z, x, b: jnp.mean(jax.nn.sigmoid(x) * residuals(z, b)) + 0.1 * z @ z,
        lambda z, x, b: jnp.mean(residuals(z, b)),
        per_sample=True,
    )

    def after_three(problem):
        solver = STARTS[method](problem)
        update, state = jax.jit(solver.update), solver.init(jnp.full(5, 0.1), jnp.zeros(8))
        for _ in range(3):
            state, info = jax.block_until_ready(update(state, bf.Batch(batch, batch, 0, 0)))
        return state, info.adjoint_residual

    mesh = sharding.make_mesh("data=2", jax.devices()[:2])
    one, expected = after_three(problem)
    many, residual = after_three(sharding.data_parallel(problem, mesh))
    np.testing.assert_allclose(residual, expected, rtol=1e-5)
    assert jnp.linalg.norm(one.adjoint) > 1e-3
    np.testing.assert_allclose(many.adjoint, one.adjoint, rtol=1e-4)
    np.testing.assert_allclose(many.outer_params, one.outer_params, rtol=1e-4)


@functools.cache
def first_order_alone():
    return run("plain", "first_order", None, steps=4)


def compiled_step(method: str, **more):
    """(HLO of a data-parallel step on 8 devices, bytes of z)."""
    task = setting("plain", weights=False)
    mesh = sharding.make_mesh("data=8")
    problem = sharding.data_parallel(task.problem, mesh)
    chosen = solver(method, task, problem, **more)
    state = jax.eval_shape(chosen.init, task.inner_params, task.outer_params)
    here = sharding.state_shardings(state, mesh, None, problem)
    batch = task.batch(0)
    compiled = (
        jax.jit(
            chosen.update,
            in_shardings=(here, sharding.batch_shardings(batch, mesh)),
            out_shardings=(here, None),
        )
        .lower(state, batch)
        .compile()
    )
    return compiled.as_text(), sum(leaf.nbytes for leaf in jax.tree.leaves(task.inner_params))


@pytest.mark.parametrize("method", ["soba", "auto", "first_order"])
def test_data_parallel_steps_reduce_the_directions_once(method):
    text, size = compiled_step(method)
    found = collectives(text)
    assert set(found) == {"all-reduce"}
    assert 2 * size <= found["all-reduce"]["bytes"] <= 2.05 * size
    assert found["all-reduce"]["count"] == 1


def test_a_step_that_moves_z_alone_reduces_z_alone():
    text, size = compiled_step("auto", update_every=2, damping=0.0)
    shapes = [
        re.findall(r"f32\[([\d,]*)\]", line.split("all-reduce(")[0])
        for line in text.splitlines()
        if " all-reduce(" in line
    ]
    sizes = [
        sum(4 * math.prod(int(n) for n in shape.split(",") if n) for shape in one) for one in shapes
    ]
    assert len(sizes) == 2  # one in each branch
    assert size <= min(sizes) <= 1.05 * size and 2 * size <= max(sizes) <= 2.05 * size


def test_losses_that_do_not_decompose_are_found():
    task = setting("plain")
    mesh = sharding.make_mesh("data=2,fsdp=4")
    point = (task.inner_params, task.outer_params, task.batch(0))
    assert sharding.decomposition(task.problem, mesh, *point) == ""

    def normalised(z, x, batch):
        return task.problem.outer_loss(z, x, batch) ** 2

    def total(z, x, batch):
        return task.problem.outer_loss(z, x, batch) * len(jax.tree.leaves(batch)[0])

    for loss, says in ((normalised, "outer_loss of a minibatch is"), (total, "is no mean over")):
        wrong = bf.Problem(task.problem.inner_loss, loss, per_sample=task.problem.per_sample)
        assert says in sharding.decomposition(wrong, mesh, *point)


def test_data_parallel_leaves_tensor_parallelism_alone():
    task = setting("plain")
    with pytest.raises(ValueError, match="tensor=2"):
        sharding.data_parallel(task.problem, sharding.make_mesh("data=4,tensor=2"))
    assert set(RULES) == {"mlp", "cnn", "transformer"}
