"""What z's optimiser does is found out, and v takes of it what has a meaning for v."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.solvers.inner_optimiser import applies_to_adjoint, trainable

# G = ½‖z - x a‖², F = ½‖z - t‖²: z* = x a, v* = t - x a, x* = a·t / a·a.
A, T = jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([[2.0, 1.0], [0.0, -1.0]])
X = float(jnp.vdot(A, T) / jnp.vdot(A, A))
RIDGE = bf.Problem(
    lambda z, x, batch: 0.5 * jnp.sum((z["w"] - x * A) ** 2),
    lambda z, x, batch: 0.5 * jnp.sum((z["w"] - T) ** 2),
)
BATCH = bf.Batch(0.0, 0.0)


def solved(solver, steps, z=None, x=0.0):
    state = solver.init({"w": jnp.zeros((2, 2))} if z is None else z, jnp.float32(x))
    run = jax.jit(
        lambda state: jax.lax.scan(lambda s, _: solver.update(s, BATCH), state, None, length=steps)
    )
    return run(state)


def families():
    """Every Optax optimiser that is made from a learning rate alone."""
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name in sorted(dir(module)):
            make = getattr(module, name)
            if not inspect.isfunction(make) or name.startswith("scale_by"):
                continue
            parameters = inspect.signature(make).parameters.values()
            needed = [
                p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
            ]
            if needed == ["learning_rate"]:
                yield prefix + name


STEPS = {"adagrad": 0.5}
REFUSED = ("fromage", "lbfgs", "polyak_sgd")
# What a quadratic with one decaying step says nothing about.
LEFT_OUT = {
    "adadelta": "moves too little in 4,000 steps",
    "adafactor": "its steps are scaled by parameters, and v starts at 0: slow",
    "lars": "normalises by layers: does not settle with a constant step",
    "noisy_sgd": "adds noise",
    "optimistic_adam": "deprecated by Optax",
    "rprop": "takes no schedule",
    "sm3": "takes no schedule",
    "contrib.acprop": "diverges on z alone with this step",
    "contrib.dadapt_adamw": "its first step divides 0 by 0 where D_v is 0",
    "contrib.madgrad": "diverges on v with this step",
    "contrib.schedule_free_adamw": "its z is an average: x follows another point",
    "contrib.simplified_ademamix": "diverges on z alone with this step",
    "contrib.sophia": "needs obj_fn",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in families() if name not in LEFT_OUT])
def test_every_optimiser_of_optax_works_or_is_refused_in_one_line(name):
    step = STEPS.get(name, 0.05)
    module, _, short = name.rpartition(".")
    make = getattr(optax.contrib if module else optax, short)
    if name in REFUSED:
        with pytest.raises(ValueError, match="pass adjoint="):
            solved(bf.soba(RIDGE, inner=make(0.05), outer=optax.sgd(0.002)), 1)
        return
    inner = make(optax.cosine_decay_schedule(step, 8000))
    state, _ = solved(bf.soba(RIDGE, inner=inner, outer=optax.sgd(0.002)), 8000)
    assert abs(float(state.outer_params) - X) < 0.02


@pytest.mark.parametrize("name", ["sam", "plateau", "line search", "decay in front", "adamw"])
def test_optimisers_that_ask_for_more_or_look_at_parameters(name):
    inner = {
        "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(1e-3)),
        "plateau": lambda: optax.chain(
            optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=5000)
        ),
        "line search": lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
        ),
        "decay in front": lambda: optax.chain(optax.add_decayed_weights(0.0), optax.sgd(0.1)),
        "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(0.05, 4000), weight_decay=1e-4),
    }[name]()
    adjoint = optax.sgd(0.1) if name == "line search" else None
    solver = bf.soba(RIDGE, inner=inner, adjoint=adjoint, outer=optax.sgd(0.005))
    state, _ = solved(solver, 4000)
    assert abs(float(state.outer_params) - X) < 0.02


def test_decay_in_front_of_the_step_is_part_of_the_system_and_behind_it_no_pull_on_v():
    z, g = {"w": jnp.ones((2, 2))}, optax.sgd(0.1)
    before = optax.chain(optax.add_decayed_weights(0.1), g)
    assert applies_to_adjoint(before, before.init(z), z)
    for inner in (optax.adamw(0.1), optax.lion(0.1), optax.adamaxw(0.1)):
        assert not applies_to_adjoint(inner, inner.init(z), z)
    warm = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 100), weight_decay=0.1)
    assert not applies_to_adjoint(warm, warm.init(z), z)
    for inner in (g, optax.adam(0.1), optax.lamb(0.1), optax.contrib.dog()):
        assert applies_to_adjoint(inner, inner.init(z), z)
    # SGD with decay: z solves (1 + d) z = x a, and v (1 + d) v = t - z, exactly.
    inner = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    state, _ = solved(bf.soba(RIDGE, inner=inner, outer=optax.set_to_zero()), 400, x=1.0)
    np.testing.assert_allclose(state.inner_params["w"], A / 1.5, atol=1e-4)
    np.testing.assert_allclose(state.adjoint["w"], (T - A / 1.5) / 1.5, atol=1e-4)


def clip(bound):
    def update(updates, state, params=None):
        limited = lambda u, p: jnp.clip(p + u, -bound, bound) - p
        return jax.tree.map(limited, updates, params), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize(
    "inner", [optax.keep_params_nonnegative(), clip(2.0)], ids=["sign", "clip"]
)
def test_projections_of_parameters_are_no_business_of_v(inner):
    chain = optax.chain(optax.sgd(0.1), inner)
    with pytest.raises(ValueError, match="changes parameters by their values .* pass adjoint="):
        solved(bf.soba(RIDGE, inner=chain, outer=optax.sgd(0.1)), 1)
    solver = bf.soba(RIDGE, inner=chain, adjoint=optax.sgd(0.1), outer=optax.set_to_zero())
    state, _ = solved(solver, 300, x=0.3)
    np.testing.assert_allclose(state.adjoint["w"], T - state.inner_params["w"], atol=1e-4)


GROUPS = {"h": "train", "b": "freeze"}
FROZEN = {
    "set_to_zero": lambda: optax.multi_transform(
        {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, GROUPS
    ),
    "masked": lambda: optax.chain(
        optax.adam(optax.cosine_decay_schedule(0.05, 4000)),
        optax.masked(optax.set_to_zero(), {"h": False, "b": True}),
    ),
    "step 0": lambda: optax.multi_transform(
        {"train": optax.sgd(0.1), "freeze": optax.sgd(0.0)}, GROUPS
    ),
    "accumulated": lambda: optax.MultiSteps(
        optax.multi_transform({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, GROUPS), 2
    ),
}


@pytest.mark.parametrize("how", FROZEN)
@pytest.mark.parametrize("method", ["soba", "auto"])
def test_parameters_that_never_move_are_no_part_of_the_system(how, method):
    """b is held at 0: h* = x, F = ½(h - 2)² + ½x², so that x* = 1; a full H would say .43."""
    problem = bf.Problem(
        lambda z, x, _: 0.5 * z["h"] ** 2 - x * z["h"] + 3 * z["b"] * z["h"] + 9 * z["b"] ** 2,
        lambda z, x, _: 0.5 * (z["h"] - 2.0) ** 2 + 0.5 * x**2,
    )
    inner = FROZEN[how]()
    z = {"h": jnp.array(0.0), "b": jnp.array(0.0)}
    assert trainable(inner, inner.init(z), z) == {"h": True, "b": False}
    if method == "soba":
        solver = bf.soba(problem, inner=inner, outer=optax.sgd(0.02))
    else:
        solver = bf.auto(problem, inner=inner, steps=4000)
    state, info = solved(solver, 4000, z, 0.5)
    assert abs(float(state.outer_params) - 1) < 0.02
    assert float(state.adjoint["b"]) == 0
    assert float(info.adjoint_residual[-1]) < 0.05


SCALAR = bf.Problem(lambda z, x, b: 0.5 * (z - x) ** 2, lambda z, x, b: 0.5 * (z - 3.0) ** 2)


def test_a_rate_that_is_written_into_zs_state_by_hand_is_vs_as_well():
    solver = bf.soba(
        SCALAR,
        inner=optax.inject_hyperparams(optax.sgd)(learning_rate=0.0),
        outer=optax.sgd(0.05),
    )
    state = solver.init(jnp.array(0.0), jnp.array(0.0))

    def step(state, t):
        hyperparams = state.inner_opt_state.hyperparams | {
            "learning_rate": 0.1 * jnp.minimum(t / 100, 1)
        }
        opened = state.inner_opt_state._replace(hyperparams=hyperparams)
        return solver.update(state.replace(inner_opt_state=opened), BATCH)[0], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(2000.0)))(state)
    assert abs(float(state.outer_params) - 3) < 1e-3


@pytest.mark.parametrize(
    "make", [lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.chain(tx, optax.apply_every(2))]
)
def test_counters_of_z_and_v_do_not_lock(make):
    solver = bf.auto(SCALAR, inner=make(optax.sgd(0.1)), steps=4000, update_every=2)
    state = solver.init(jnp.array(0.0), jnp.array(0.0))
    run = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: solver.update(s, BATCH), s, None, length=4000)
    )
    state, _ = run(state)
    assert abs(float(state.outer_params) - 3) < 0.05


def test_sabas_mean_does_not_drift_in_float32():
    """Each addition to a plain float32 mean loses up to half a unit in its last place."""
    n = 32
    a, b = jnp.linspace(0.5, 1.5, n), jnp.linspace(-1.0, 2.0, n)
    problem = bf.Problem(
        lambda z, x, i: 0.5 * a[i] * (z - x - b[i]) ** 2,
        lambda z, x, i: 0.5 * (z - 3 * b[i]) ** 2,
    )
    solver = bf.saba(
        problem,
        inner=optax.sgd(0.1),
        outer=optax.sgd(0.0),
        num_inner_batches=n,
        num_outer_batches=n,
    )
    ids = jnp.asarray(np.random.default_rng(0).integers(0, n, (100_000, 2)), jnp.int32)

    def step(state, pair):
        i, j = pair
        return solver.update(state, bf.Batch(i, j, i, j))[0], None

    state = solver.init(jnp.float32(0), jnp.float32(0))
    state, _ = jax.jit(lambda s, ids: jax.lax.scan(step, s, ids))(state, ids)
    right = float(3 * b.mean() - state.inner_params) / float(a.mean())
    assert abs(float(state.adjoint) - right) < 2e-6  # a plain sum: 4e-4 after 400,000 steps
