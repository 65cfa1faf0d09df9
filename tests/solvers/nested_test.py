"""The methods with their own loop against NumPy transcriptions of their equations, float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transcriptions

import bilevel_flax as bf
from bilevel_flax import contrib
from bilevel_flax.solvers.nested import linear_solves as adjoints

STEPS = 50
SIZE, NUM_INNER, NUM_OUTER = 4, 5, 3


def problem_of(data: transcriptions.Smooth) -> tuple[bf.Problem, dict, dict]:
    """The same losses for JAX, and the minibatches of both sides."""

    def inner_loss(z, x, batch):
        quadratic = 0.5 * z @ batch["A"] @ z + batch["c"] @ z
        penalty = 0.5 * jnp.sum(jnp.exp(x) * z**2)
        return quadratic + penalty + 0.25 * batch["s"] * jnp.sum(z**4)

    def outer_loss(z, x, batch):
        quadratic = 0.5 * z @ batch["P"] @ z + batch["q"] @ z
        return quadratic + batch["t"] * (x @ z) + 0.5 * batch["r"] * (x @ x)

    inner = {name: jnp.asarray(getattr(data, name)) for name in "Acs"}
    outer = {name: jnp.asarray(getattr(data, name)) for name in "Pqtr"}
    return bf.Problem(inner_loss, outer_loss), inner, outer


def growth(t):
    return 5.0 * (t + 1.0) ** 0.2


def fast(t):
    return 0.2 * (t + 1.0) ** -0.4


def slow(t):
    return 0.1 * (t + 1.0) ** -0.6


def shrinking(t):
    return 0.3 * (t + 1.0) ** -0.1


# name: (solver's arguments, transcription, its settings). SGD steps: rho on z, gamma on x.
RHO, GAMMA = 0.1, 0.05
COUNTS = {"num_inner_batches": NUM_INNER, "num_outer_batches": NUM_OUTER}
STEPS_3_4 = {"inner_steps": 3, "adjoint_steps": 4}
CASES = {
    "amigo": (
        bf.amigo,
        STEPS_3_4 | {"adjoint": optax.sgd(0.15)},
        transcriptions.amigo,
        STEPS_3_4 | {"adjoint_rho": 0.15},
    ),
    "amigo_shared_step": (
        bf.amigo,
        STEPS_3_4,
        transcriptions.amigo,
        STEPS_3_4 | {"adjoint_rho": RHO},
    ),
    "stocbio": (
        bf.stocbio,
        STEPS_3_4 | {"adjoint_step": 0.2},
        transcriptions.stocbio,
        STEPS_3_4 | {"eta": 0.2},
    ),
    "bsa": (
        contrib.bsa,
        STEPS_3_4 | {"adjoint_step": shrinking},
        transcriptions.bsa,
        STEPS_3_4 | {"eta": shrinking},
    ),
    "ttsa": (
        contrib.ttsa,
        {
            "adjoint_step": 0.2,
            "adjoint_steps": 5,
            "inner": optax.sgd(fast),
            "outer": optax.sgd(slow),
        },
        transcriptions.ttsa,
        {"adjoint_steps": 5, "eta": 0.2, "rho": fast, "gamma": slow},
    ),
    "mrbo": (
        contrib.mrbo,
        {"adjoint_step": 0.2, "adjoint_steps": 4},
        transcriptions.mrbo,
        {"adjoint_steps": 4, "eta": 0.2, "momentum": lambda t: (t + 1) ** (-2 / 3)},
    ),
    "mrbo_constant": (
        contrib.mrbo,
        {"adjoint_step": 0.2, "adjoint_steps": 0, "eta": 0.4},
        transcriptions.mrbo,
        {"adjoint_steps": 0, "eta": 0.2, "momentum": 0.4},
    ),
    "sustain": (
        contrib.sustain,
        {"adjoint_step": 0.2, "adjoint_steps": 5},
        transcriptions.sustain,
        {"adjoint_steps": 5, "eta": 0.2, "momentum": lambda t: (t + 1) ** (-2 / 3)},
    ),
    "vrbo": (
        contrib.vrbo,
        {"inner_steps": 2, "adjoint_steps": 3, "adjoint_step": 0.2, "period": 7} | COUNTS,
        transcriptions.vrbo,
        {"inner_steps": 2, "adjoint_steps": 3, "eta": 0.2, "period": 7},
    ),
    "f2sa": (
        bf.f2sa,
        {"inner_steps": 3, "penalty": growth},
        transcriptions.f2sa,
        {"inner_steps": 3, "penalty": growth, "penalised_rho": None},
    ),
    "f2sa_own_step": (
        bf.f2sa,
        {"inner_steps": 3, "penalty": growth, "penalised": optax.sgd(0.01)},
        transcriptions.f2sa,
        {"inner_steps": 3, "penalty": growth, "penalised_rho": 0.01},
    ),
    "implicit_cg": (
        bf.implicit,
        {"inner_steps": 3, "adjoint_steps": 3, "damping": 0.1},
        transcriptions.implicit,
        {"inner_steps": 3, "adjoint_steps": 3, "damping": 0.1},
    ),
    "implicit_neumann": (
        bf.implicit,
        STEPS_3_4 | {"linear_solver": "neumann", "adjoint_step": 0.2},
        transcriptions.implicit,
        STEPS_3_4 | {"eta": 0.2, "damping": 0.0},
    ),
    "bsg": (
        contrib.bsg,
        {"inner_steps": 3, "adjoint_steps": 3},
        transcriptions.bsg,
        {"inner_steps": 3, "adjoint_steps": 3, "damping": 0.0},
    ),
    "bsgo": (
        contrib.bsgo,
        {"inner_steps": 3, "adjoint_steps": 3},
        transcriptions.implicit,
        {"inner_steps": 3, "adjoint_steps": 3, "damping": 0.0},
    ),
    "unrolled": (bf.unrolled, {"inner_steps": 4}, transcriptions.unrolled, {}),
}


class Run:
    """A solver's compiled functions of ids; the minibatches are gathered inside."""

    def __init__(self, solver: bf.BilevelSolver, inner, outer):
        def batch(i, j):
            pick = lambda tree, k: None if k is None else jax.tree.map(lambda leaf: leaf[k], tree)
            return bf.Batch(pick(inner, i), pick(outer, j), i, j)

        self.solver = solver
        self.update = jax.jit(lambda state, i, j: solver.update(state, batch(i, j)))
        self.refresh = jax.jit(lambda state, i, j: solver.refresh(state, batch(i, j)))

    def full_pass(self, state, num_inner: int = NUM_INNER) -> tuple[bf.TrainState, float]:
        """Everything of the pass that is due, wherever the method says to go on, and its units."""
        units = 0.0
        while int(self.solver.next_refresh(state)) <= int(state.step):
            at = int(self.solver.refresh_cursor(state))
            inner = at < num_inner
            ids = (np.int32(at), None) if inner else (None, np.int32(at - num_inner))
            state = self.refresh(state, *ids)
            units += self.solver.refresh_units[not inner]
        return state, units

    def draw(self, rng: np.random.Generator, sizes=(NUM_INNER, NUM_OUTER)) -> tuple:
        """Ids of one update's fresh minibatches."""
        pairs = zip(sizes, self.solver.batches, strict=True)
        i, j = (rng.integers(n, size=k).astype(np.int32) for n, k in pairs)
        return (i[0], j[0]) if self.solver.batches == (1, 1) else (i, j)


@pytest.mark.parametrize("name", CASES)
def test_equals_its_transcription(name, x64):
    make, arguments, transcription, settings = CASES[name]
    data = transcriptions.smooth()
    problem, inner, outer = problem_of(data)
    weights = {"inner_weights": data.inner_weights, "outer_weights": data.outer_weights}
    sgd = {"inner": optax.sgd(RHO), "outer": optax.sgd(GAMMA)}
    solver = make(problem, **(sgd | weights | arguments))
    settings = {"rho": RHO, "gamma": GAMMA} | settings

    rng = np.random.default_rng(1)
    z, x = rng.normal(size=SIZE), rng.normal(size=SIZE) * 0.3
    key = jax.random.PRNGKey(7)
    state = solver.init(jnp.asarray(z), jnp.asarray(x), rng=key)
    run = Run(solver, inner, outer)
    expected = {"z": z, "v": np.zeros(SIZE), "x": x}
    for t in range(STEPS):
        i, j = run.draw(rng)
        count = settings.get("adjoint_steps", 1)
        p = int(adjoints.draw_factors(key, jnp.int32(t), max(count, 1)))
        expected = transcription(
            data, settings, expected | {"t": t}, np.atleast_1d(i), np.atleast_1d(j), p
        )
        state, _ = run.full_pass(state)
        state, info = run.update(state, i, j)
        for ours, theirs in zip(state.variables, (expected[k] for k in "zvx"), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12, err_msg=f"{t}")
        assert all(bool(flag) for flag in info.finite)
    moved = [
        np.abs(np.asarray(a) - b).max()
        for a, b in ((state.inner_params, z), (state.outer_params, x))
    ]
    assert min(moved) > 0.1, moved
