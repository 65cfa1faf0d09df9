"""The oracles under bfloat16 compute with float32 masters, against float32.

Two ways: a network that computes in bfloat16, and `Problem(compute_dtype="bfloat16")` around one
that computes in what it is handed.

bfloat16 keeps 8 bits: eps = 2**-7 = .8 %. Stated tolerances: ∇₁G, Hv and Jv are within 2 % of their
float32 values (measured: .4 to .9 %) and of differences of float32 gradients, and the Hessian is
symmetric to 5e-4 of ‖u‖‖Hv‖ (measured: 8e-5). Everything that the solver keeps stays float32.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf

TOLERANCE, SYMMETRY = 0.02, 5e-4
N = 32
rng = np.random.default_rng(0)
BATCH = {
    "image": rng.normal(size=(N, 6, 6, 1)).astype(np.float32),
    "label": rng.integers(0, 4, size=N),
    "index": np.arange(N),
}


class Net(nn.Module):
    """Computes in `dtype` (None: in that of what it is handed); its parameters are float32."""

    dtype: Any

    @nn.compact
    def __call__(self, images):
        out = nn.Conv(8, (3, 3), strides=2, dtype=self.dtype)(images)
        out = nn.tanh(nn.LayerNorm(dtype=self.dtype)(out)).reshape(len(out), -1)
        out = nn.tanh(nn.Dense(32, dtype=self.dtype)(out))
        return nn.Dense(4, dtype=self.dtype)(out).astype(jnp.float32)


def problem(dtype) -> bf.Problem:
    net = Net(dtype)

    def losses(z, batch):
        logits = net.apply({"params": z}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    return bf.Problem(
        lambda z, x, batch: (
            (jax.nn.sigmoid(x["logits"]) * losses(z, batch)).mean()
            + jnp.exp(x["decay"]) * optax.tree.norm(z, squared=True)
        ),
        lambda z, x, batch: losses(z, batch).mean(),
        per_sample={"logits": True, "decay": False},
    )


def like(tree, seed):
    flat, back = ravel_pytree(tree)
    return back(jnp.asarray(np.random.default_rng(seed).normal(size=flat.shape), flat.dtype))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def relative(found, expected):
    return np.linalg.norm(flat(found) - flat(expected)) / np.linalg.norm(flat(expected))


Z = jax.jit(Net(jnp.float32).init)(jax.random.key(0), BATCH["image"])["params"]
X = {"logits": jnp.linspace(-2.0, 2.0, N), "decay": jnp.float32(-5.0)}
U, V = like(Z, 1), like(Z, 2)
HANDED = "handed bfloat16"
LOW = (jnp.bfloat16, HANDED)
ALL = {dtype: problem(dtype) for dtype in (jnp.bfloat16, jnp.float32)}
ALL[HANDED] = bf.oracles.mixed_precision(problem(None), "bfloat16")


def products(dtype, v):
    """(∇₁G, Hv, Jv), Jv without its rows' indices."""
    grad, hvp, cross = bf.oracles.inner_products(ALL[dtype], bf.Variables(Z, v, X), BATCH)[1:]
    return grad, hvp, {**cross, "logits": cross["logits"].values}


@pytest.fixture(scope="module")
def computed():
    runs = {dtype: jax.jit(functools.partial(products, dtype)) for dtype in ALL}
    return {dtype: {"u": run(U), "v": run(V)} for dtype, run in runs.items()}


@pytest.mark.parametrize("low", LOW)
def test_bfloat16_is_really_used(computed, low):
    found, exact = computed[low]["v"], computed[jnp.float32]["v"]
    assert relative(found[1], exact[1]) > 1e-4


@pytest.mark.parametrize("low", LOW)
def test_products_are_those_of_float32(computed, low):
    for name in ("u", "v"):
        for found, exact in zip(computed[low][name], computed[jnp.float32][name], strict=True):
            assert relative(found, exact) < TOLERANCE
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, SYMMETRY), (HANDED, SYMMETRY), (jnp.float32, 1e-6)]
)
def test_the_hessian_is_symmetric(computed, dtype, tolerance):
    hu, hv = flat(computed[dtype]["u"][1]), flat(computed[dtype]["v"][1])
    u, v = flat(U), flat(V)
    scale = np.linalg.norm(u) * np.linalg.norm(hv)
    assert abs(u @ hv) > 10 * tolerance * scale  # there is something to compare
    assert abs(u @ hv - v @ hu) < tolerance * scale


def test_products_are_differences_of_float32_gradients(computed):
    """An independent reference: central differences of ∇₁G and ∇₂G, computed in float32."""
    gradient = jax.jit(
        lambda z: jax.grad(lambda z, x: ALL[jnp.float32].inner_loss(z, x, BATCH), argnums=(0, 1))(
            z, X
        )
    )
    step = 3e-3
    moved = [
        gradient(jax.tree.map(lambda a, b, sign=sign: a + sign * step * b, Z, V))
        for sign in (1, -1)
    ]
    hvp, cross = jax.tree.map(lambda plus, minus: (plus - minus) / (2 * step), *moved)
    for dtype in ALL:
        _, found_hvp, found_cross = computed[dtype]["v"]
        assert relative(found_hvp, hvp) < TOLERANCE
        assert relative(found_cross, cross) < TOLERANCE


def test_all_that_the_solver_keeps_is_float32():
    solver = bf.auto(ALL[HANDED], inner=optax.adam(1e-3), steps=10)
    state = solver.init(Z, X)
    update = jax.jit(solver.update)
    for _ in range(2):
        state, info = update(state, bf.Batch(BATCH, BATCH))
    bf.check_finite(info)
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.inexact)]
    assert {a.dtype for a in floats} == {jnp.dtype(jnp.float32)}
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(state.adjoint))


def test_what_the_losses_are_handed():
    """Parameters and inputs are rounded; integers, masks and x are not, nor is any result."""
    seen = {}

    def inner(z, x, batch):
        seen["inner"] = jax.tree.map(lambda leaf: leaf.dtype.name, (z, x, batch))
        return bf.masked_mean((batch["a"] * z - x) ** 2, batch["mask"])

    def outer(z, x, batch):
        seen["outer"] = jax.tree.map(lambda leaf: leaf.dtype.name, (z, x, batch))
        return jnp.mean((batch["a"] * z) ** 2)

    both = bf.oracles.mixed_precision(bf.Problem(inner, outer), jnp.bfloat16)
    batch = {"a": jnp.ones(3), "mask": jnp.ones(3), "index": jnp.arange(3)}
    at = bf.Variables(*(jnp.float32(value) for value in (1.0, 2.0, 3.0)))
    found = jax.eval_shape(lambda: bf.oracles.evaluate(both, at, bf.Batch(batch, batch)))
    handed = {"a": "bfloat16", "mask": "float32", "index": "int32"}
    assert seen == dict.fromkeys(("inner", "outer"), ("bfloat16", "float32", handed))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute_dtype": "float16"}, "compute_dtype='float16' is not among"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8' is not among"),
        ({"compute_dtype": "bf16"}, "compute_dtype='bf16' is not among"),
        (
            {"compute_dtype": "bfloat16", "derivatives": "finite_differences"},
            "8 bits, too few for derivatives",
        ),
    ],
)
def test_dtypes_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        bf.oracles.configured(ALL[jnp.float32], settings)


@pytest.mark.parametrize("name", ["storm", "fsla", "masoba", "mrbo"])
def test_a_long_average_of_equal_directions_is_that_direction(name):
    """now - (1 - η) before is η now: of that, bfloat16 keeps no digit; D_x was .39 for .334."""
    problem = bf.Problem(lambda z, x, _: x * z**2, lambda z, x, _: x * z)
    rest = {"inner": optax.set_to_zero(), "outer": optax.set_to_zero()}
    settings = {"theta": 0.01} if name == "masoba" else {"eta": 0.01}
    if name == "mrbo":
        settings |= {"adjoint_steps": 0, "adjoint_step": 1e-6}
    method = bf.storm if name == "storm" else getattr(bf.contrib, name)
    solver = method(problem, **rest, **settings)
    third = jnp.asarray(1 / 3, jnp.bfloat16)
    sizes = solver.batches
    batch = bf.Batch(0.0, 0.0) if sizes == (1, 1) else bf.Batch(*map(jnp.zeros, sizes))
    step = lambda state, _: solver.update(state, batch)
    run = jax.jit(lambda state: jax.lax.scan(step, state, None, length=700))
    _, info = run(solver.init(third, jnp.asarray(0.1, jnp.bfloat16)))
    np.testing.assert_allclose(info.norms.outer[-1], third, rtol=0.01)
