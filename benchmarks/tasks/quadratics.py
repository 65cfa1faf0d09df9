"""Random quadratics with closed-form h: a task whose every number can be checked by hand.

    G_i = ½ (a_iᵀz)² + (b_iᵀz)(c_iᵀx) + t_iᵀz          F_j = ½ (p_jᵀz + q_jᵀx - y_j)² + ½ μ‖x‖²

n = 32,768 inner and 1,024 outer samples, z in R^100, x in R^10, μ = 0.1; the eigenvalues of the
inner Hessian lie between about 0.1 and 1.

References:
    M. Dagréou, T. Moreau, S. Vaiter, P. Ablin. A lower bound and a near-optimal algorithm for
    bilevel empirical risk minimization. AISTATS 2024 (sizes and μ).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.base import Problem
from bilevel_flax.bench.tasks import BenchTask, Context, Measured, Optimizers, Setting
from bilevel_flax.data import partition
from bilevel_flax.minibatches import masked_mean
from bilevel_flax.train.task import InitialValues, Task

SIZES = {"samples": 32_768, "outer_samples": 1_024, "inner_size": 100, "outer_size": 10}
MU = 0.1
BATCH_SIZE = 64
BOX = (-3.0, 3.0)
# Steps after which a decaying step has halved, in gradient units.
_PATIENCE_UNITS = 8_000.0


class Means(NamedTuple):
    """F and G over all samples, float64.

    G = ½ zᵀHz + zᵀBx + tᵀz,  F = ½ uᵀMu - wᵀu + c + ½ μ‖x‖² with u = (z, x).
    """

    hessian: np.ndarray
    coupling: np.ndarray
    linear: np.ndarray
    outer_hessian: np.ndarray
    outer_linear: np.ndarray
    constant: float

    def value_and_grad(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """h(x) and ∇h(x)."""
        x = np.asarray(x, np.float64)
        z = -np.linalg.solve(self.hessian, self.coupling @ x + self.linear)
        u = np.concatenate([z, x])
        gradient = self.outer_hessian @ u - self.outer_linear
        value = 0.5 * u @ self.outer_hessian @ u - self.outer_linear @ u + self.constant
        v = -np.linalg.solve(self.hessian, gradient[: len(z)])
        total = self.coupling.T @ v + gradient[len(z) :] + MU * x
        return float(value + 0.5 * MU * x @ x), total

    def minimiser(self) -> np.ndarray:
        """Argmin of h, a strongly convex quadratic."""
        size = self.coupling.shape[1]
        at_zero = self.value_and_grad(np.zeros(size))[1]
        columns = [self.value_and_grad(unit)[1] - at_zero for unit in np.eye(size)]
        return -np.linalg.solve(np.stack(columns, axis=1), at_zero)


def draw(
    seed: int, *, samples: int, outer_samples: int, inner_size: int, outer_size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The samples of G and of F, in JAX's default float type."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(outer_size, inner_size)) / np.sqrt(inner_size)
    c = rng.normal(size=(samples, outer_size))
    inner = {
        "a": rng.normal(size=(samples, inner_size)) * np.geomspace(MU, 1, inner_size) ** 0.5,
        # Correlated with c, or the coupling would average out.
        "b": c @ mixing + 0.5 * rng.normal(size=(samples, inner_size)) / np.sqrt(inner_size),
        "c": c,
        "t": rng.normal(size=(samples, inner_size)) / np.sqrt(inner_size) + 0.1,
    }
    outer = {
        "p": rng.normal(size=(outer_samples, inner_size)) / np.sqrt(inner_size),
        "q": rng.normal(size=(outer_samples, outer_size)) / np.sqrt(outer_size),
        "y": 1.0 + rng.normal(size=outer_samples),
    }
    dtype = jnp.result_type(float)
    inner, outer = ({k: v.astype(dtype) for k, v in side.items()} for side in (inner, outer))
    return inner, outer


def means(inner: dict[str, np.ndarray], outer: dict[str, np.ndarray]) -> Means:
    """The data's means, of exactly the numbers that the losses see."""
    wide = {k: v.astype(np.float64) for k, v in (inner | outer).items()}
    joint = np.concatenate([wide["p"], wide["q"]], axis=1)
    count = len(wide["a"])
    return Means(
        hessian=wide["a"].T @ wide["a"] / count,
        coupling=wide["b"].T @ wide["c"] / count,
        linear=wide["t"].mean(0),
        outer_hessian=joint.T @ joint / len(joint),
        outer_linear=joint.T @ wide["y"] / len(joint),
        constant=float(0.5 * np.mean(wide["y"] ** 2)),
    )


def _inner_loss(z: jax.Array, x: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    quadratic = 0.5 * (batch["a"] @ z) ** 2
    values = quadratic + (batch["b"] @ z) * (batch["c"] @ x) + batch["t"] @ z
    return masked_mean(values, batch.get("mask"))


def _outer_loss(z: jax.Array, x: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    values = 0.5 * (batch["p"] @ z + batch["q"] @ x - batch["y"]) ** 2
    return masked_mean(values, batch.get("mask")) + 0.5 * MU * jnp.sum(x**2)


def optimizers(setting: Setting) -> Optimizers:
    """Plain SGD on all three variables."""
    patience = _PATIENCE_UNITS / setting.units

    def sgd(step: float, exponent: float):
        return optax.sgd(lambda t: step / (1 + t / patience) ** exponent if exponent else step)

    gamma = setting.rho / setting.ratio
    inner = sgd(setting.rho, setting.inner_decay)
    return Optimizers(inner, sgd(gamma, setting.outer_decay), setting.rho)


def make(name: str, context: Context, **sizes: int) -> BenchTask:
    """The bench task; the data are the same for every seed, their order is not.

    Args:
        name: as on the command line.
        context: its seed orders the minibatches.
        **sizes: other sizes than the published ones.
    """
    sizes = SIZES | sizes
    inner, outer = draw(0, **sizes)
    exact = means(inner, outer)
    best = exact.value_and_grad(exact.minimiser())[0]

    def init(rng):
        del rng
        return InitialValues(jnp.zeros(sizes["inner_size"]), jnp.ones(sizes["outer_size"]))

    def measure(state):
        value, _ = exact.value_and_grad(np.asarray(state.outer_params))
        return Measured(value, value)

    return BenchTask(
        name=name,
        task=Task(
            problem=Problem(_inner_loss, _outer_loss),
            init=init,
            inner=partition(inner, BATCH_SIZE, seed=context.seed),
            outer=partition(outer, BATCH_SIZE, seed=context.seed),
            evaluate=lambda state: {"h": measure(state).value},
        ),
        measure=measure,
        optimizers=optimizers,
        quantity="h - h*",
        default=(0.25, 1.0),
        seconds=10.0,
        best=lambda: best,
        box=BOX,
    )
