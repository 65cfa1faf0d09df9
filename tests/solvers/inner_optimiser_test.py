"""What z's optimiser does is found out, and v takes of it what has a meaning for v."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax.solvers.inner_optimiser import trainable
from bilevel_flax.solvers.optimiser_probes import (
    applies_to_adjoint,
    coupled_decay,
    is_linear,
    scales_by_parameters,
)

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


def mapped(function):
    """A transformation that sets parameters to a function of where the step would take them."""
    return optax.stateless(lambda u, p: jax.tree.map(lambda u, p: function(p + u) - p, u, p))


CONSTRAINTS = {
    "sign": optax.keep_params_nonnegative(),
    "clip": clip(2.0),
    "a wide clip": clip(1e4),
    "sphere": mapped(lambda w: w / jnp.linalg.norm(w)),
    "ball": mapped(lambda w: w * jnp.minimum(1.0, 50.0 / jnp.linalg.norm(w))),
    "soft threshold": mapped(lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - 1e-3, 0.0)),
    "rounding": mapped(lambda w: jnp.round(w * 64) / 64),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_projections_of_parameters_are_no_business_of_v_wherever_they_stand(name):
    constraint, z = CONSTRAINTS[name], {"w": jnp.ones((2, 2)), "u": jnp.ones(2)}
    labels = {"w": "held", "u": "free"}
    for inner in (
        optax.chain(optax.sgd(0.1), constraint),
        optax.chain(constraint, optax.sgd(0.1)),
        optax.chain(optax.adam(0.01), constraint),
        optax.multi_transform(
            {"held": optax.chain(optax.sgd(0.1), constraint), "free": optax.sgd(0.1)}, labels
        ),
        optax.apply_if_finite(optax.chain(optax.sgd(0.1), constraint), 3),
    ):
        with pytest.raises(ValueError, match="changes parameters by their values .* pass adjoint="):
            applies_to_adjoint(inner, inner.init(z), z)


@pytest.mark.parametrize("name", ["sign", "clip"])
def test_with_an_optimiser_of_its_own_v_is_right_where_no_constraint_is_active(name):
    chain = optax.chain(optax.sgd(0.1), CONSTRAINTS[name])
    with pytest.raises(ValueError, match="changes parameters by their values .* pass adjoint="):
        solved(bf.soba(RIDGE, inner=chain, outer=optax.sgd(0.1)), 1)
    solver = bf.soba(RIDGE, inner=chain, adjoint=optax.sgd(0.1), outer=optax.set_to_zero())
    state, _ = solved(solver, 300, x=0.3)
    np.testing.assert_allclose(state.adjoint["w"], T - state.inner_params["w"], atol=1e-4)


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
        optax.chain(optax.scale_by_param_block_norm(), optax.sgd(0.05)),
        optax.chain(optax.scale_by_param_block_rms(), optax.sgd(0.05)),
    ],
    ids=["adaptive clip", "norm of a block", "its root mean square"],
)
def test_where_the_size_of_parameters_gives_the_step_its_length_that_of_z_is_vs(inner):
    """V starts at 0, and with steps as long as itself it stayed there: x ended at -.42."""
    z = {"w": jnp.ones((2, 2))}
    assert scales_by_parameters(inner, inner.init(z), z)
    assert not scales_by_parameters(optax.contrib.dog(), optax.contrib.dog().init(z), z)
    solver = bf.soba(RIDGE, inner=inner, outer=optax.sgd(0.005))
    state, _ = solved(solver, 4000, z=z, x=1.0)
    assert abs(float(state.outer_params) - X) < 0.02


GROUPS = {"h": "train", "b": "freeze"}


def grouped(frozen):
    return optax.multi_transform({"train": optax.sgd(0.1), "freeze": frozen}, GROUPS)


FROZEN = {  # and the method that it is tried with
    "set_to_zero": (lambda: grouped(optax.set_to_zero()), "implicit"),
    "accumulated": (lambda: optax.MultiSteps(grouped(optax.set_to_zero()), 2), "soba"),
    "masked": (
        lambda: optax.chain(
            optax.adam(optax.cosine_decay_schedule(0.05, 4000)),
            optax.masked(optax.set_to_zero(), {"h": False, "b": True}),
        ),
        "auto",
    ),
    "step 0": (lambda: grouped(optax.sgd(0.0)), "auto"),
    "an array of 0": (lambda: grouped(optax.sgd(jnp.array(0.0))), "implicit"),
    "never chosen": (
        lambda: grouped(
            optax.stateless(lambda u, _: jax.tree.map(lambda g: jnp.where(False, g, 0), u))
        ),
        "implicit",
    ),
    "a schedule of 0": (lambda: grouped(optax.sgd(optax.linear_schedule(0.0, 0.0, 9))), "implicit"),
    "0 in the state": (
        lambda: grouped(optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)),
        "auto",
    ),
    "0 for now": (lambda: grouped(optax.sgd(lambda t: jnp.where(t < 10**6, 0.0, 0.1))), "auto"),
    "in a full pass": (lambda: grouped(optax.set_to_zero()), "vrbo"),
}
COUPLED = bf.Problem(
    lambda z, x, _: 0.5 * z["h"] ** 2 - x * z["h"] + 3 * z["b"] * z["h"] + 9 * z["b"] ** 2,
    lambda z, x, _: 0.5 * (z["h"] - 2.0) ** 2 + 0.5 * x**2,
)
AT_0 = {"h": jnp.array(0.0), "b": jnp.array(0.0)}


def of_method(method, problem, inner, outer):
    if method == "auto":
        return bf.auto(problem, inner=inner, steps=4000)
    settings = {
        "implicit": {"inner_steps": 10, "adjoint_steps": 5},
        "amigo": {"inner_steps": 10, "adjoint_steps": 10},
        "stocbio": {"inner_steps": 10, "adjoint_steps": 60, "adjoint_step": 0.3},
        "vrbo": {"inner_steps": 5, "adjoint_steps": 20, "adjoint_step": 0.5, "period": 9}
        | {"num_inner_batches": 1, "num_outer_batches": 1},
    }.get(method, {})
    module = bf.contrib if method == "vrbo" else bf
    return getattr(module, method)(problem, inner=inner, outer=outer, **settings)


def brought_on(solver, state, steps):
    """Steps with the passes that are due."""
    inner, outer = (jnp.zeros(count) for count in solver.batches)
    update, refresh = jax.jit(solver.update), jax.jit(solver.refresh)
    for _ in range(steps):
        while solver.next_refresh(state) <= state.step:
            first = int(solver.refresh_cursor(state)) == 0
            state = refresh(state, bf.Batch(**({"inner": 0.0} if first else {"outer": 0.0})))
        state, info = update(state, bf.Batch(inner, outer))
    return state, info


@pytest.mark.parametrize("how", FROZEN)
def test_parameters_that_never_move_are_no_part_of_the_system(how):
    """b is held at 0: h* = x, F = ½(h - 2)² + ½x², so that x* = 1; a full H would say .43."""
    make, method = FROZEN[how]
    inner = make()
    assert trainable(inner, inner.init(AT_0), AT_0) == {"h": True, "b": False}
    solver = of_method(method, COUPLED, inner, optax.sgd(0.05))
    if solver.batches == (1, 1) and method != "implicit":
        state, info = solved(solver, 4000, AT_0, 0.5)
        info = jax.tree.map(lambda leaf: leaf[-1], info)
    else:
        state, info = brought_on(solver, solver.init(AT_0, jnp.float32(0.5)), 150)
    assert abs(float(state.outer_params) - 1) < 0.02
    assert float(state.adjoint["b"]) == 0
    assert float(info.adjoint_residual) < 0.05


def test_what_comes_to_rest_in_the_run_takes_its_v_along():
    """From step 500 on b stays where it is: h* = x - 3b, and x* = 1 + 1.5 b."""
    frozen = optax.sgd(lambda t: jnp.where(t < 500, 0.05, 0.0))
    solver = bf.soba(COUPLED, inner=grouped(frozen), outer=optax.sgd(0.02))
    before, _ = solved(solver, 500, AT_0, 0.5)
    assert abs(float(before.adjoint["b"])) > 0.1
    state, _ = solved(solver, 4000, AT_0, 0.5)
    assert float(state.adjoint["b"]) == 0
    assert abs(float(state.outer_params) - (1 + 1.5 * float(state.inner_params["b"]))) < 1e-3


@pytest.mark.parametrize("method", ["soba", "implicit", "amigo", "stocbio"])
def test_decay_in_front_of_the_step_is_in_every_methods_system(method):
    """Z solves (1 + d) z = x a, so dF/dx = ⟨a / 1.5, x a / 1.5 - t⟩ for d = .5."""
    inner = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    seen = optax.GradientTransformation(jnp.zeros_like, lambda d, state, _=None: (0 * d, d))
    solver = of_method(method, RIDGE, inner, seen)
    state = solver.init({"w": jnp.zeros((2, 2))}, jnp.float32(1.0))
    if method == "soba":
        state, info = solved(solver, 400, x=1.0)
    else:
        state, info = brought_on(solver, state, 20)
    assert float(jnp.atleast_1d(info.adjoint_residual)[-1]) < 1e-3
    right = float(jnp.vdot(A / 1.5, A / 1.5 - T))
    np.testing.assert_allclose(state.outer_opt_state, right, atol=1e-3)


@pytest.mark.parametrize(
    "make", [optax.adamw, lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate))]
)
@pytest.mark.parametrize("transform", [jax.vmap, lambda f: jax.jit(lambda rates: f(rates[0]))])
def test_a_traced_rate_of_what_must_be_asked_is_refused(make, transform):
    def run(rate):
        solver = bf.soba(SCALAR, inner=make(rate), outer=optax.sgd(0.1))
        return solver.update(solver.init(jnp.array(0.0), jnp.array(0.0)), BATCH)[0].adjoint

    with pytest.raises(ValueError, match="inner takes steps that are traced .*with numbers"):
        jax.eval_shape(transform(run), jnp.array([0.1, 0.2]))


AT_TIMES = {  # optimisers that act in some of their calls alone
    "mean of 5": lambda tx: optax.MultiSteps(tx, 5),
    "mean of more and more": lambda tx: optax.MultiSteps(
        tx, lambda t: jnp.where(jnp.asarray(t) < 3, 1, 6)
    ),
    "sum of 3": lambda tx: optax.MultiSteps(tx, 3, use_grad_mean=False),
    "every 4th": lambda tx: optax.chain(tx, optax.apply_every(4)),
    "unless a NaN": lambda tx: optax.apply_if_finite(tx, 3),
    "at third steps": lambda tx: optax.transforms.conditionally_mask(
        tx, lambda step, **_: jnp.asarray(step) % 3 == 2
    ),
}


@pytest.mark.parametrize("when", AT_TIMES)
def test_an_optimiser_that_gathers_gradients_is_asked_when_it_acts(when):
    """Every k-th step acts: asked in others it decayed nothing, or k times what it decays."""
    z, at_times = {"w": jnp.ones((2, 2))}, AT_TIMES[when]
    decaying = at_times(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)))
    rate = coupled_decay(decaying, decaying.init(z), z)
    # Of a sum of k gradients the decay, added once, is a k-th.
    np.testing.assert_allclose(rate["w"], 0.5 / (3 if when == "sum of 3" else 1), rtol=1e-5)
    assert is_linear(decaying, z)
    behind, lamb = at_times(optax.adamw(0.1, weight_decay=0.1)), at_times(optax.lamb(0.1))
    assert not applies_to_adjoint(behind, behind.init(z), z)
    assert scales_by_parameters(lamb, lamb.init(z), z)
    projected = at_times(optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()))
    assert coupled_decay(projected, projected.init(z), z) is None
    with pytest.raises(ValueError, match="changes parameters by their values"):
        applies_to_adjoint(projected, projected.init(z), z)


@pytest.mark.parametrize("when", ["mean of 5", "every 4th"])
def test_a_group_at_rest_is_found_where_gradients_are_gathered(when):
    inner = AT_TIMES[when](grouped(optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)))
    assert trainable(inner, inner.init(AT_0), AT_0) == {"h": True, "b": False}


@pytest.mark.parametrize("when", ["mean of 5", "sum of 3"])
def test_the_decay_of_gathered_gradients_is_in_the_system(when):
    inner = AT_TIMES[when](optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)))
    decay = 0.5 / (3 if when == "sum of 3" else 1)
    state, _ = solved(bf.soba(RIDGE, inner=inner, outer=optax.set_to_zero()), 1500, x=1.0)
    z = A / (1 + decay)
    np.testing.assert_allclose(state.inner_params["w"], z, atol=1e-4)
    np.testing.assert_allclose(state.adjoint["w"], (T - z) / (1 + decay), atol=1e-4)


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
