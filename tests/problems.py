"""Small problems with closed forms, shared by the tests (`from problems import quadratics`).

The closed forms are plain NumPy in float64, independent of bilevel_flax.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel_flax as bf
from bilevel_flax.data import FiniteSum

INNER_SHAPES = {"b": (3,), "w": (2, 2)}
OUTER_SHAPES = {"s": (2, 1), "u": (2,)}


def _size(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _tree(vector, shapes):
    """A flat vector as a dict of leaves, in the order of the sorted names (as `ravel_pytree`)."""
    out, at = {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        out[name] = vector[at : at + size].reshape(shapes[name])
        at += size
    return out


def _flat(tree) -> np.ndarray:
    """A dict of leaves as one float64 vector."""
    return np.concatenate([np.asarray(tree[k], np.float64).ravel() for k in sorted(tree)])


def _spd(rng, num, size, spread, floor):
    factor = rng.normal(size=(num, size, size))
    return spread / size * np.einsum("nij,nkj->nik", factor, factor) + floor * np.eye(size)


def _partition(samples: dict, num: int, batch: int, ragged: bool, padding: float):
    """Samples [n, ...] -> minibatches [num, batch, ...]; padding is loud, the mask must mute it."""
    count = len(next(iter(samples.values())))
    room = num * batch
    out = {}
    for name, values in samples.items():
        fill = 0 if name == "index" else padding
        rest = np.full((room - count, *values.shape[1:]), fill, values.dtype)
        out[name] = np.concatenate([values, rest]).reshape(num, batch, *values.shape[1:])
    mask = (np.arange(room) < count).reshape(num, batch)
    if ragged:
        out["mask"] = mask.astype(np.float64)
    return jax.device_put(out), mask.sum(1) / count


@dataclasses.dataclass(frozen=True)
class Quadratics:
    """G_i = ½zᵀA_i z + zᵀB_i x + c_iᵀz, F_j = ½zᵀP_j z + zᵀQ_j x + ½xᵀR_j x + q_jᵀz + r_jᵀx.

    Attributes:
        problem: the losses, means over the minibatch, on dicts of two leaves each.
        inner_batches: dict of leaves [num_inner, batch, ...] with "mask" when ragged, and "index".
        outer_batches: the same, [num_outer, batch, ...].
        inner_weights: float [num_inner], shares of the samples.
        outer_weights: float [num_outer].
        inner_params: the start z₀.
        outer_params: the start x₀.
        means: the data's means, float64 NumPy, by the letters above.
    """

    problem: bf.Problem
    inner_batches: dict
    outer_batches: dict
    inner_weights: np.ndarray
    outer_weights: np.ndarray
    inner_params: dict
    outer_params: dict
    inner_shapes: dict
    outer_shapes: dict
    means: dict
    dtype: Any

    @property
    def num_inner(self) -> int:
        return len(self.inner_weights)

    @property
    def num_outer(self) -> int:
        return len(self.outer_weights)

    def batch(self, i, j) -> bf.Batch:
        """Minibatches i and j with their ids; traced i, j are fine."""

        def pick(tree, k):
            if isinstance(k, jax.core.Tracer):
                return jax.tree.map(lambda leaf: leaf[k], tree)
            # NumPy's indexing compiles nothing.
            at = np.asarray(k)
            return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[at]), tree)

        return bf.Batch(
            pick(self.inner_batches, i),
            pick(self.outer_batches, j),
            jnp.asarray(i, jnp.int32),
            jnp.asarray(j, jnp.int32),
        )

    def _as_inner(self, vector):
        return jax.device_put(_tree(np.asarray(vector, self.dtype), self.inner_shapes))

    def _as_outer(self, vector):
        return jax.device_put(_tree(np.asarray(vector, self.dtype), self.outer_shapes))

    def _solve(self, x):
        m = self.means
        z = -np.linalg.solve(m["A"], m["B"] @ x + m["c"])
        v = -np.linalg.solve(m["A"], m["P"] @ z + m["Q"] @ x + m["q"])
        return z, v

    def _grad_h(self, x, step=None):
        m = self.means
        z, v = self._solve(x)
        if step is not None:
            v = -step * (m["P"] @ z + m["Q"] @ x + m["q"])
        return m["B"].T @ v + m["Q"].T @ z + m["R"] @ x + m["r"]

    def z_star(self, x) -> dict:
        """Argmin of G(., x)."""
        return self._as_inner(self._solve(_flat(x))[0])

    def v_star(self, x) -> dict:
        """The solution of ∇²₁₁G v = -∇₁F at (z*(x), x)."""
        return self._as_inner(self._solve(_flat(x))[1])

    def h(self, x) -> float:
        """F(z*(x), x)."""
        m, x = self.means, _flat(x)
        z, _ = self._solve(x)
        quadratic = 0.5 * z @ m["P"] @ z + z @ m["Q"] @ x + 0.5 * x @ m["R"] @ x
        return float(quadratic + m["q"] @ z + m["r"] @ x)

    def grad_h(self, x) -> dict:
        """∇h(x)."""
        return self._as_outer(self._grad_h(_flat(x)))

    def x_star(self, step: float | None = None) -> dict:
        """Argmin of h, which is strongly convex; with `step`, where v = -step ∇₁F would end."""
        zero = np.zeros(_size(self.outer_shapes))
        at_zero = self._grad_h(zero, step)
        columns = [self._grad_h(zero + e, step) - at_zero for e in np.eye(len(zero))]
        return self._as_outer(-np.linalg.solve(np.stack(columns, 1), at_zero))

    def full_directions(self, variables: bf.Variables) -> bf.Variables:
        """(D_z, D_v, D_x) of the whole data."""
        m = self.means
        z, v, x = (_flat(tree) for tree in variables)
        d_z = m["A"] @ z + m["B"] @ x + m["c"]
        d_v = m["A"] @ v + m["P"] @ z + m["Q"] @ x + m["q"]
        d_x = m["B"].T @ v + m["Q"].T @ z + m["R"] @ x + m["r"]
        return bf.Variables(self._as_inner(d_z), self._as_inner(d_v), self._as_outer(d_x))

    def random_variables(self, seed: int = 1) -> bf.Variables:
        """A point with nothing zero in it."""
        rng = np.random.default_rng(seed)
        p, d = _size(self.inner_shapes), _size(self.outer_shapes)
        draw = lambda size: rng.normal(size=size)
        return bf.Variables(
            self._as_inner(draw(p)), self._as_inner(draw(p)), self._as_outer(draw(d))
        )


def finite_sums(source: Any) -> tuple[FiniteSum, FiniteSum]:
    """A problem's minibatches as the data that loops and diagnostics take."""
    sums = []
    for batches, weights in (
        (source.inner_batches, source.inner_weights),
        (source.outer_batches, source.outer_weights),
    ):
        num_batches, size = batches["index"].shape
        leaves = jax.tree.map(np.asarray, batches)
        count = round(leaves["mask"].sum()) if "mask" in leaves else num_batches * size
        sums.append(FiniteSum(leaves, np.asarray(weights), count, num_batches, size))
    return sums[0], sums[1]


def _inner_quadratic(z, x, batch):
    z, x = ravel_pytree(z)[0], ravel_pytree(x)[0]
    values = (
        0.5 * jnp.einsum("i,nij,j->n", z, batch["A"], z)
        + jnp.einsum("i,nij,j->n", z, batch["B"], x)
        + batch["c"] @ z
    )
    return bf.masked_mean(values, batch.get("mask"))


def _outer_quadratic(z, x, batch):
    z, x = ravel_pytree(z)[0], ravel_pytree(x)[0]
    values = (
        0.5 * jnp.einsum("i,nij,j->n", z, batch["P"], z)
        + jnp.einsum("i,nij,j->n", z, batch["Q"], x)
        + 0.5 * jnp.einsum("i,nij,j->n", x, batch["R"], x)
        + batch["q"] @ z
        + batch["r"] @ x
    )
    return bf.masked_mean(values, batch.get("mask"))


def quadratics(
    seed: int = 0,
    *,
    num_inner: int = 4,
    num_outer: int = 3,
    batch: int = 2,
    inner_shapes: dict | None = None,
    outer_shapes: dict | None = None,
    ragged: bool = False,
    dtype: Any = None,
) -> Quadratics:
    """A well-conditioned quadratic problem: eigenvalues of every A_i in about [1, 3].

    Args:
        seed: of the data and the start.
        num_inner: N, minibatches of the inner data.
        num_outer: M, minibatches of the outer data.
        batch: samples a minibatch.
        inner_shapes: leaf shapes of z by name; 7 parameters by default.
        outer_shapes: leaf shapes of x by name; 4 by default.
        ragged: the last minibatches hold one sample less, padded with loud values and masked.
        dtype: of everything; None: float64 under x64, else float32.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    inner_shapes, outer_shapes = inner_shapes or INNER_SHAPES, outer_shapes or OUTER_SHAPES
    p, d = _size(inner_shapes), _size(outer_shapes)
    rng = np.random.default_rng(seed)
    n, m = num_inner * batch - ragged, num_outer * batch - ragged
    # Jointly positive definite, so that h is strongly convex.
    joint = _spd(rng, m, p + d, 0.5, 0.5)
    inner = {
        "A": _spd(rng, n, p, 0.5, 1.0),
        "B": rng.normal(size=(n, p, d)) / np.sqrt(d),
        "c": rng.normal(size=(n, p)),
    }
    outer = {
        "P": joint[:, :p, :p],
        "Q": joint[:, :p, p:],
        "R": joint[:, p:, p:],
        "q": rng.normal(size=(m, p)),
        "r": rng.normal(size=(m, d)),
    }
    # What the losses see is rounded to dtype; the closed forms must use the same numbers.
    as_dtype = lambda values: np.asarray(values, dtype)
    inner, outer = ({k: as_dtype(a) for k, a in side.items()} for side in (inner, outer))
    means = {k: a.astype(np.float64).mean(0) for k, a in (inner | outer).items()}
    inner["index"], outer["index"] = np.arange(n, dtype=np.int32), np.arange(m, dtype=np.int32)
    inner_batches, inner_weights = _partition(inner, num_inner, batch, ragged, 1e3)
    outer_batches, outer_weights = _partition(outer, num_outer, batch, ragged, 1e3)
    found = Quadratics(
        problem=bf.Problem(_inner_quadratic, _outer_quadratic),
        inner_batches=inner_batches,
        outer_batches=outer_batches,
        inner_weights=inner_weights,
        outer_weights=outer_weights,
        inner_params={},
        outer_params={},
        inner_shapes=inner_shapes,
        outer_shapes=outer_shapes,
        means=means,
        dtype=dtype,
    )
    z, _, x = found.random_variables(seed + 1)
    return dataclasses.replace(found, inner_params=z, outer_params=x)


@dataclasses.dataclass(frozen=True)
class Logistic:
    """Logistic regression z with a learned weight σ(x_i) for each training sample and a penalty.

    `outer_params` is {"logits": [n], "penalty": scalar}; `declared` tells whether the logits are
    a per-sample leaf. Both forms are the same function of (z, x).
    """

    problem: bf.Problem
    inner_batches: dict
    outer_batches: dict
    inner_weights: np.ndarray
    outer_weights: np.ndarray
    inner_params: dict
    outer_params: dict
    num_samples: int
    declared: bool

    batch = Quadratics.batch


def logistic(
    seed: int = 0,
    per_sample: bool = True,
    *,
    num_samples: int = 7,
    num_outer_samples: int = 5,
    features: int = 3,
    batch: int = 2,
) -> Logistic:
    """A ragged, tiny hypercleaning problem (in float64 under x64).

    Args:
        seed: of the data and the start.
        per_sample: declare the logits to the Problem; False: the loss gathers them itself.
        num_samples: training samples; odd, so that the last minibatch of 2 is ragged.
        num_outer_samples: validation samples.
        features: inputs of the model.
        batch: samples a minibatch.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=features)

    def draw(n):
        inputs = rng.normal(size=(n, features))
        labels = np.where(inputs @ truth + 0.3 * rng.normal(size=n) > 0, 1.0, -1.0)
        return {"inputs": inputs, "labels": labels, "index": np.arange(n, dtype=np.int32)}

    def nll(z, data):
        return jax.nn.softplus(-data["labels"] * (data["inputs"] @ z["w"] + z["b"]))

    def inner_loss(z, x, data):
        logits = x["logits"] if per_sample else x["logits"][data["index"]]
        values = jax.nn.sigmoid(logits) * nll(z, data)
        squares = jnp.sum(z["w"] ** 2) + z["b"] ** 2
        return bf.masked_mean(values, data.get("mask")) + 0.5 * jnp.exp(x["penalty"]) * squares

    def outer_loss(z, x, data):
        return bf.masked_mean(nll(z, data), data.get("mask")) + 0.01 * x["penalty"] ** 2

    inner, outer = draw(num_samples), draw(num_outer_samples)
    sides = []
    for data, n in ((inner, num_samples), (outer, num_outer_samples)):
        sides.append(_partition(data, -(-n // batch), batch, n % batch > 0, 30.0))
    return Logistic(
        problem=bf.Problem(
            inner_loss,
            outer_loss,
            per_sample={"logits": True, "penalty": False} if per_sample else None,
        ),
        inner_batches=sides[0][0],
        outer_batches=sides[1][0],
        inner_weights=sides[0][1],
        outer_weights=sides[1][1],
        inner_params={
            "w": jax.device_put(rng.normal(size=features)),
            "b": jax.device_put(np.float64(rng.normal())),
        },
        outer_params={
            "logits": jax.device_put(rng.normal(size=num_samples)),
            "penalty": jax.device_put(np.float64(-1.0)),
        },
        num_samples=num_samples,
        declared=per_sample,
    )
