"""The nested methods written out in NumPy from their equations; no line of bilevel_flax is called.

The problem is smooth, not quadratic, with unequal minibatches, so that a Hessian taken at the
wrong point, a wrong minibatch or a forgotten weight shows:

    G_i = ½ zᵀA_i z + c_iᵀz + ½ Σ e^{x_k} z_k² + ¼ s_i Σ z_k⁴
    F_j = ½ zᵀP_j z + q_jᵀz + t_j xᵀz + ½ r_j ‖x‖²

An update is a function of (problem, settings, state, i, j, p): a dict of what the method keeps,
the ids of its fresh minibatches and the randomised Neumann's p. It returns the new state.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Smooth:
    """Minibatches by id, with their shares of the samples."""

    A: np.ndarray
    c: np.ndarray
    s: np.ndarray
    P: np.ndarray
    q: np.ndarray
    t: np.ndarray
    r: np.ndarray
    inner_weights: np.ndarray
    outer_weights: np.ndarray

    def _n(self, i):
        return len(self.inner_weights) * self.inner_weights[i]

    def _m(self, j):
        return len(self.outer_weights) * self.outer_weights[j]

    def g1(self, i, z, x):
        return self._n(i) * (self.A[i] @ z + self.c[i] + np.exp(x) * z + self.s[i] * z**3)

    def g2(self, i, z, x):
        return self._n(i) * 0.5 * np.exp(x) * z**2

    def H(self, i, z, x):
        return self._n(i) * (self.A[i] + np.diag(np.exp(x) + 3 * self.s[i] * z**2))

    def J(self, i, z, x):
        return self._n(i) * np.diag(np.exp(x) * z)

    def F(self, j, z, x):
        quadratic = 0.5 * z @ self.P[j] @ z + self.q[j] @ z
        return self._m(j) * (quadratic + self.t[j] * x @ z + 0.5 * self.r[j] * x @ x)

    def f1(self, j, z, x):
        return self._m(j) * (self.P[j] @ z + self.q[j] + self.t[j] * x)

    def f2(self, j, z, x):
        return self._m(j) * (self.t[j] * z + self.r[j] * x)

    def full(self, of: str, *point):
        """The mean over all minibatches of `g1`, `H`, ..."""
        num = len(self.outer_weights if of.startswith("f") else self.inner_weights)
        return sum(getattr(self, of)(k, *point) for k in range(num)) / num


def smooth(seed: int = 0, size: int = 4, num_inner: int = 5, num_outer: int = 3) -> Smooth:
    """Eigenvalues of every Hessian in about [1, 4] near the origin."""
    rng = np.random.default_rng(seed)

    def spd(num):
        factor = rng.normal(size=(num, size, size))
        return 0.4 / size * np.einsum("nij,nkj->nik", factor, factor) + 0.5 * np.eye(size)

    def shares(num):
        values = rng.uniform(0.6, 1.4, num)
        return values / values.sum()

    return Smooth(
        A=spd(num_inner),
        c=rng.normal(size=(num_inner, size)),
        s=rng.uniform(0.05, 0.2, num_inner),
        P=spd(num_outer),
        q=rng.normal(size=(num_outer, size)),
        t=rng.normal(size=num_outer) * 0.3,
        r=rng.uniform(0.5, 1.0, num_outer),
        inner_weights=shares(num_inner),
        outer_weights=shares(num_outer),
    )


State = dict[str, Any]


def _value(setting, t):
    return setting(t) if callable(setting) else setting


def _sgd(d, z, x, ids, rho):
    for i in ids:
        z = z - rho * d.g1(i, z, x)
    return z


def _neumann(d, z, x, ids, j, eta):
    """V = -η Σ_k Π_{j≤k} (I - ηH_j) ∇₁F."""
    term = d.f1(j, z, x)
    total = term.copy()
    for i in ids:
        term = term - eta * d.H(i, z, x) @ term
        total = total + term
    return -eta * total


def _randomised(d, z, x, ids, j, eta, count, p):
    """V = -Kη Π_{k<=p} (I - ηH) ∇₁F."""
    term = d.f1(j, z, x)
    for i in ids[:p]:
        term = (np.eye(len(z)) - eta * d.H(i, z, x)) @ term
    return -count * eta * term


def _d_x(d, z, v, x, i, j):
    return d.J(i, z, x).T @ v + d.f2(j, z, x)


def amigo(d, s, state: State, i, j, p) -> State:
    z, v, x = state["z"], state["v"], state["x"]
    T, S = s["inner_steps"], s["adjoint_steps"]
    z = _sgd(d, z, x, i[:T], s["rho"])
    grad = d.f1(j[0], z, x)
    for k in i[T : T + S]:
        v = v - s["adjoint_rho"] * (d.H(k, z, x) @ v + grad)
    x = x - s["gamma"] * _d_x(d, z, v, x, i[T + S], j[0])
    return state | {"z": z, "v": v, "x": x}


def stocbio(d, s, state, i, j, p):
    z, x = state["z"], state["x"]
    T, Q = s["inner_steps"], s["adjoint_steps"]
    z = _sgd(d, z, x, i[:T], s["rho"])
    v = _neumann(d, z, x, i[T : T + Q], j[0], s["eta"])
    x = x - s["gamma"] * _d_x(d, z, v, x, i[T + Q], j[0])
    return state | {"z": z, "v": v, "x": x}


def bsa(d, s, state, i, j, p):
    z, x, t = state["z"], state["x"], state["t"]
    T, K = s["inner_steps"], s["adjoint_steps"]
    v = _randomised(d, z, x, i[: K - 1], j[0], _value(s["eta"], t), K, p)
    x = x - s["gamma"] * _d_x(d, z, v, x, i[K - 1], j[0])
    z = _sgd(d, z, x, i[K:], s["rho"])
    assert len(i[K:]) == T
    return state | {"z": z, "v": v, "x": x}


def ttsa(d, s, state, i, j, p):
    z, x, t = state["z"], state["x"], state["t"]
    K = s["adjoint_steps"]
    z = _sgd(d, z, x, i[:1], s["rho"](t))
    v = _randomised(d, z, x, i[1:K], j[0], s["eta"], K, p)
    x = x - s["gamma"](t) * _d_x(d, z, v, x, i[K], j[0])
    return state | {"z": z, "v": v, "x": x}


def _double_momentum(d, s, state, solve, i_grad, i_cross, j):
    z, x, t = state["z"], state["x"], state["t"]
    old_z, old_x = (z, x) if t == 0 else state["previous"]
    v = solve(z, x)
    now_z, now_x = d.g1(i_grad, z, x), _d_x(d, z, v, x, i_cross, j)
    before_z = d.g1(i_grad, old_z, old_x)
    before_x = _d_x(d, old_z, solve(old_z, old_x), old_x, i_cross, j)
    if t == 0:
        d_z, d_x = now_z, now_x
    else:
        eta = _value(s["momentum"], t)
        d_z = eta * now_z + (1 - eta) * (state["d_z"] + now_z - before_z)
        d_x = eta * now_x + (1 - eta) * (state["d_x"] + now_x - before_x)
    new = {"z": z - s["rho"] * d_z, "v": v, "x": x - s["gamma"] * d_x}
    return state | new | {"previous": (z, x), "d_z": d_z, "d_x": d_x}


def mrbo(d, s, state, i, j, p):
    Q = s["adjoint_steps"]
    solve = lambda z, x: _neumann(d, z, x, i[1 : 1 + Q], j[0], s["eta"])
    return _double_momentum(d, s, state, solve, i[0], i[1 + Q], j[0])


def sustain(d, s, state, i, j, p):
    K = s["adjoint_steps"]
    solve = lambda z, x: _randomised(d, z, x, i[1:K], j[0], s["eta"], K, p)
    return _double_momentum(d, s, state, solve, i[0], i[K], j[0])


def vrbo(d, s, state, i, j, p):
    z, x, t = state["z"], state["x"], state["t"]
    T, Q, eta = s["inner_steps"], s["adjoint_steps"], s["eta"]
    d_z, d_x = state.get("d_z"), state.get("d_x")
    if t % s["period"] == 0:
        d_z = d.full("g1", z, x)
        hessian, term = d.full("H", z, x), d.full("f1", z, x)
        total = term
        for _ in range(Q):
            term = term - eta * hessian @ term
            total = total + term
        d_x = d.full("J", z, x).T @ (-eta * total) + d.full("f2", z, x)
    old_z, old_x = z, x
    x = x - s["gamma"] * d_x
    for k, ids in enumerate(np.reshape(i, (T, Q + 2))):

        def both(z, x, ids=ids, k=k):
            v = _neumann(d, z, x, ids[1 : 1 + Q], j[k], eta)
            return d.g1(ids[0], z, x), _d_x(d, z, v, x, ids[1 + Q], j[k]), v

        now_z, now_x, v = both(z, x)
        before_z, before_x, _ = both(old_z, old_x)
        d_z = d_z + now_z - before_z
        d_x = d_x + now_x - before_x
        old_z, old_x = z, x
        z = z - s["rho"] * d_z
    return state | {"z": z, "v": v, "x": x, "d_z": d_z, "d_x": d_x}


def f2sa(d, s, state, i, j, p):
    z, x, t = state["z"], state["x"], state["t"]
    y = state.get("y", z)
    penalty = s["penalty"](t)
    rate = s["penalised_rho"] or s["rho"] / penalty
    for k in range(s["inner_steps"]):
        y_new = y - rate * (penalty * d.g1(i[k], y, x) + d.f1(j[k], y, x))
        z = z - s["rho"] * d.g1(i[k], z, x)
        y = y_new
    gap = d.g2(i[-1], y, x) - d.g2(i[-1], z, x)
    new_x = x - s["gamma"] * (d.f2(j[-1], y, x) + penalty * gap)
    return state | {"z": z, "v": penalty * (y - z), "x": new_x, "y": y}


def textbook_cg(matrix, right, steps):
    solution, residue = np.zeros_like(right), right.copy()
    direction = residue.copy()
    for _ in range(steps):
        image = matrix @ direction
        length = residue @ residue / (direction @ image)
        solution = solution + length * direction
        after = residue - length * image
        direction = after + (after @ after) / (residue @ residue) * direction
        residue = after
    return solution


def _implicit(d, s, state, descent, i, j):
    z, x = state["z"], state["x"]
    z = _sgd(d, z, x, descent, s["rho"])
    matrix = d.H(i, z, x) + s["damping"] * np.eye(len(z))
    grad = d.f1(j, z, x)
    if s.get("eta"):
        powers = [
            np.linalg.matrix_power(np.eye(len(z)) - s["eta"] * matrix, k)
            for k in range(s["adjoint_steps"] + 1)
        ]
        v = -s["eta"] * sum(powers) @ grad
    else:
        v = textbook_cg(matrix, -grad, s["adjoint_steps"])
    x = x - s["gamma"] * _d_x(d, z, v, x, i, j)
    return state | {"z": z, "v": v, "x": x}


def implicit(d, s, state, i, j, p):
    return _implicit(d, s, state, i[:-1], i[-1], j[0])


def bsg(d, s, state, i, j, p):
    return _implicit(d, s, state, [i[0]] * s["inner_steps"], i[0], j[0])


def unrolled(d, s, state, i, j, p):
    """Forward mode: dz/dx is carried along."""
    z, x = state["z"], state["x"]
    sensitivity = np.zeros((len(z), len(x)))
    for k in i:
        step = d.H(k, z, x) @ sensitivity + d.J(k, z, x)
        z, sensitivity = z - s["rho"] * d.g1(k, z, x), sensitivity - s["rho"] * step
    x = x - s["gamma"] * (sensitivity.T @ d.f1(j[0], z, x) + d.f2(j[0], z, x))
    return state | {"z": z, "x": x}
