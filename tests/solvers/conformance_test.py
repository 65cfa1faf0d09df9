"""Every solver x every promise of `BilevelSolver`. A new solver joins by one row of METHODS."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratics

import bilevel_flax as bf
from bilevel_flax import contrib
from bilevel_flax.checkpoints.checkpointer import Checkpointer
from bilevel_flax.solvers.first_order import estimator as by_penalty

NUM_INNER, NUM_OUTER, BATCH = 4, 3, 4


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        make: `make(problem, inner=optax, outer=optax) -> BilevelSolver`; NUM_INNER and NUM_OUTER
            minibatches where it asks.
        units: gradient units of one update.
        inner: step size of z and v on the quadratic (eigenvalues of ∇²₁₁G in about [1, 3]).
        outer: step size of x.
        steps: updates after which x must be within `tolerance` of argmin h, all minibatches being
            the same.
        tolerance: of max |x - x*|, in float32; larger only for methods with a bias or with noise
            of their own (a randomised series).
        spread: how far the units of one update may lie from their mean.
        refresh_units: those of one minibatch of a full pass, where there is one.
        response: x ends where D_x is zero with v = -response · ∇₁F; None: with v*, at argmin h.
    """

    make: Callable[..., bf.BilevelSolver]
    units: float
    inner: float = 0.3
    outer: float = 0.1
    steps: int = 600
    tolerance: float = 1e-3
    spread: float = 0.0
    refresh_units: tuple[float, float] = (3.0, 1.0)
    response: float | None = None


COUNTS = {"num_inner_batches": NUM_INNER, "num_outer_batches": NUM_OUTER}

partial = functools.partial
SERIES = {"adjoint_steps": 30, "adjoint_step": 0.3}
RANDOM_SERIES = {"adjoint_steps": 8, "adjoint_step": 0.3}
NOISY = {"outer": 0.003, "steps": 1000, "tolerance": 0.05}
SOLVE = {"inner_steps": 5, "adjoint_steps": 8}

METHODS = {
    "soba": Method(bf.soba, units=4),
    "saba": Method(partial(bf.saba, **COUNTS), units=4),
    "srba": Method(partial(bf.srba, **COUNTS, period=5), units=8),
    "spaba": Method(partial(contrib.spaba, **COUNTS, probability=0.2), units=8),
    "masoba": Method(partial(contrib.masoba, theta=0.3), units=4),
    "storm": Method(partial(bf.storm, eta=0.3), units=8),
    "fsla": Method(partial(contrib.fsla, eta=0.3), units=6),
    "amigo": Method(partial(bf.amigo, inner_steps=3, adjoint_steps=3), units=8),
    "stocbio": Method(partial(bf.stocbio, inner_steps=5, **SERIES), units=37),
    "bsa": Method(
        partial(contrib.bsa, inner_steps=5, **RANDOM_SERIES), units=10.5, spread=3.5, **NOISY
    ),
    "ttsa": Method(partial(contrib.ttsa, **RANDOM_SERIES), units=6.5, spread=3.5, **NOISY),
    "mrbo": Method(partial(contrib.mrbo, **SERIES), units=66),
    "sustain": Method(partial(contrib.sustain, **RANDOM_SERIES), units=13, spread=7.0, **NOISY),
    "vrbo": Method(
        partial(contrib.vrbo, inner_steps=3, **SERIES, period=5, **COUNTS),
        units=198,
        steps=200,
        refresh_units=(1.0, 1.0),
    ),
    "first_order": Method(
        lambda problem, **optimisers: bf.single_loop(
            problem, by_penalty(), name="first_order", **optimisers
        ),
        units=3,
    ),
    "f2sa": Method(partial(bf.f2sa, inner_steps=5, penalty=1e3), units=18),
    "implicit": Method(partial(bf.implicit, **SOLVE), units=15),
    "bsg": Method(partial(contrib.bsg, **SOLVE), units=15),
    "bsgo": Method(partial(contrib.bsgo, **SOLVE), units=15),
    "unrolled": Method(partial(bf.unrolled, inner_steps=30), units=91),
    "darts1": Method(contrib.darts1, units=2, response=0.0),
    "darts2": Method(contrib.darts2, units=4, response=0.3),
}

# One optimiser for one rate: what is asked of each is compiled for each.
sgd = functools.cache(functools.partial(optax.sgd, momentum=0.1))
every_method = pytest.mark.parametrize("name", METHODS)


def nest(tree: dict, names: tuple[str, str]) -> Any:
    """The two leaves of a quadratic's variable, in a pytree with some depth."""
    return {"deep": {names[0]: tree[names[0]]}, "list": [(tree[names[1]],)]}


def flat(tree: Any, names: tuple[str, str]) -> dict:
    """The way back."""
    return {names[0]: tree["deep"][names[0]], names[1]: tree["list"][0][0]}


INNER, OUTER = ("w", "b"), ("u", "s")


@functools.cache
def data(same: bool):
    """The quadratic; `same`: every minibatch holds all its data, so nothing is random."""
    if not same:
        return quadratics(num_inner=NUM_INNER, num_outer=NUM_OUTER, batch=BATCH)
    one = quadratics(num_inner=1, num_outer=1, batch=BATCH)
    tile = lambda side, n: jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), side)
    return dataclasses.replace(
        one,
        inner_batches=tile(one.inner_batches, NUM_INNER),
        outer_batches=tile(one.outer_batches, NUM_OUTER),
        inner_weights=np.full(NUM_INNER, 1 / NUM_INNER),
        outer_weights=np.full(NUM_OUTER, 1 / NUM_OUTER),
    )


@functools.cache
def pair(same: bool, i: int, j: int) -> bf.Batch:
    return data(same).batch(i, j)


def minibatches_of(same: bool) -> tuple:
    return data(same).inner_batches, data(same).outer_batches


def batch_of(minibatches: tuple, i: jax.Array, j: jax.Array) -> bf.Batch:
    inner, outer = minibatches
    pick = lambda side, at: jax.tree.map(lambda leaf: leaf[at], side)
    return bf.Batch(pick(inner, i), pick(outer, j), i, j)


def nested_problem(loss_of=lambda loss: loss) -> bf.Problem:
    """The quadratic's losses on nested pytrees."""
    problem = data(False).problem
    inner = lambda z, x, batch: problem.inner_loss(flat(z, INNER), flat(x, OUTER), batch)
    outer = lambda z, x, batch: problem.outer_loss(flat(z, INNER), flat(x, OUTER), batch)
    return bf.Problem(loss_of(inner), outer)


class Run:
    """A solver with its compiled functions, shared by the tests of one row."""

    def __init__(self, name: str):
        self.method = METHODS[name]
        self.traces = 0
        self.solver = self.method.make(
            nested_problem(),
            inner=sgd(self.method.inner),
            outer=sgd(self.method.outer),
        )
        like = self.init(), self.batch(0)
        _, info = jax.eval_shape(self.solver.update, *like)

        def updates(state, minibatches, start, stop):
            """Those numbered start .. stop, and the last one's Info; one program for all tests."""
            self.traces += 1

            def update(step, carry):
                ids = jax.tree.map(lambda leaf: leaf[step], self._ids)
                return self.solver.update(carry[0], batch_of(minibatches, *ids))

            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), info)
            return jax.lax.fori_loop(start, stop, update, (state, nothing))

        self._updates = jax.jit(updates, donate_argnums=0)
        self._refresh = jax.jit(self.solver.refresh, donate_argnums=0)

    @functools.cached_property
    def _ids(self) -> tuple[jax.Array, jax.Array]:
        """Which minibatches an update takes: int32 [steps], or [steps, K] for several."""
        rng = np.random.default_rng(0)
        steps = max(method.steps for method in METHODS.values())
        shapes = [
            (steps,) if self.solver.batches == (1, 1) else (steps, k) for k in self.solver.batches
        ]
        inner, outer = (
            jnp.asarray(rng.integers(count, size=shape), jnp.int32)
            for count, shape in zip((NUM_INNER, NUM_OUTER), shapes, strict=True)
        )
        return inner, outer

    def init(self, same: bool = False) -> bf.TrainState:
        start = data(same)
        z, x = nest(start.inner_params, INNER), nest(start.outer_params, OUTER)
        return self.solver.init(z, x, rng=jax.random.PRNGKey(3))

    def batch(self, step: int) -> bf.Batch:
        """Minibatches of one update; with a leading [K], [L] where a solver takes several."""
        return data(False).batch(*(ids[step] for ids in self._ids))

    def updated(self, state, step: int, stop: int | None = None, minibatches=None):
        """The state after the updates `step` .. `stop` (one), whose state is gone, and the Info."""
        minibatches = minibatches_of(False) if minibatches is None else minibatches
        return self._updates(state, minibatches, step, step + 1 if stop is None else stop)

    def ready(self, state: bf.TrainState, same: bool = False) -> bf.TrainState:
        """Runs the full pass that is due, if one is."""
        while int(self.solver.next_refresh(state)) <= int(state.step):
            at = int(self.solver.refresh_cursor(state))
            inner = at < NUM_INNER
            both = pair(same, at if inner else 0, 0 if inner else at - NUM_INNER)
            if inner:
                state = self._refresh(state, bf.Batch(both.inner, None, both.inner_id, None))
            else:
                state = self._refresh(state, bf.Batch(None, both.outer, None, both.outer_id))
        return state

    def advance(self, state: bf.TrainState, steps: int, same: bool = False) -> bf.TrainState:
        step = int(state.step)
        last = step + steps
        while step < last:
            state = self.ready(state, same)
            stop = min(last, int(self.solver.next_refresh(state)))
            state, info = self.updated(state, step, stop, minibatches_of(same))
            assert all(bool(flag) for flag in info.finite)
            step = stop
        return state


@functools.cache
def run_of(name: str) -> Run:
    return Run(name)


def assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def on_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


@every_method
def test_leaves_that_are_no_floats_stay_as_they_are(name):
    """Keys, bools, integers and None beside the floats of z and x; traced, for all methods."""
    others = (jax.random.key(0), jax.random.PRNGKey(1), jnp.array([True]), jnp.arange(2), None)
    run = run_of(name)
    problem = nested_problem()
    among = lambda loss: lambda z, x, batch: loss(z["floats"], x["floats"], batch)
    problem = bf.Problem(among(problem.inner_loss), among(problem.outer_loss))
    solver = run.method.make(problem, inner=sgd(0.1), outer=sgd(0.1))
    found = data(False)
    z, x = nest(found.inner_params, INNER), nest(found.outer_params, OUTER)
    start = {"floats": z, "others": others}, {"floats": x, "others": others}
    before = jax.eval_shape(solver.init, *start)
    after, _ = jax.eval_shape(solver.update, before, run.batch(0))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


@pytest.mark.parametrize("name", ["soba", "saba", "f2sa"])
def test_leaves_that_are_no_floats_keep_their_values(name):
    others = {"key": jax.random.key(0), "flag": jnp.array([True]), "count": jnp.arange(2)}
    loss = lambda z, x, batch: jnp.mean((z["w"] - x["w"] * batch) ** 2)
    kind = {"num_inner_batches": 2, "num_outer_batches": 2} if name == "saba" else {}
    kind |= {"inner_steps": 1} if name == "f2sa" else {}
    solver = getattr(bf, name)(bf.Problem(loss, loss), inner=sgd(0.1), outer=sgd(0.1), **kind)
    start = {"w": jnp.ones(2), **others}
    batch = bf.Batch(
        *(jnp.ones((k, 2)) for k in solver.batches), jnp.zeros(2, int)[0], jnp.int32(0)
    )
    if solver.batches == (1, 1):
        batch = batch._replace(inner=batch.inner[0], outer=batch.outer[0])
    else:
        batch = batch._replace(inner_id=None, outer_id=None)
    state = solver.init(start, {**start, "w": 2 * jnp.ones(2)})
    after, _ = jax.jit(solver.update)(state, batch)
    for variable in (after.inner_params, after.outer_params):
        assert (jax.random.key_data(variable["key"]) == jax.random.key_data(others["key"])).all()
        assert bool(variable["flag"][0]) and variable["count"].tolist() == [0, 1]


@every_method
def test_protocol(name):
    run = run_of(name)
    state = run.ready(run.init())
    assert int(state.step) == 0
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    state, info = run.updated(state, 0)
    assert isinstance(state, bf.TrainState) and isinstance(info, bf.Info)
    assert int(state.step) == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    assert jax.tree.structure(state.adjoint) == jax.tree.structure(state.inner_params)
    assert all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(info))
    assert run.solver.name
    start = run.init()
    moved = [
        float(optax.tree.norm(optax.tree.sub(new, old)))
        for new, old in (
            (state.inner_params, start.inner_params),
            (state.outer_params, start.outer_params),
        )
    ]
    # A first outer step from v = 0 may be no step; the inner one must be.
    assert moved[0] > 0, moved


@every_method
def test_oracle_units(name):
    run = run_of(name)
    _, info = run.updated(run.ready(run.init()), 0)
    assert run.solver.units == run.method.units
    assert float(info.oracle_units) == pytest.approx(run.method.units, abs=run.method.spread + 1e-6)
    if bool(run.solver.next_refresh(run.init()) == 0):
        assert run.solver.refresh_units == run.method.refresh_units


@every_method
def test_one_trace_and_donation(name):
    run = run_of(name)
    state = run.ready(run.init())
    for step in range(4):
        old = state
        state, _ = run.updated(state, step)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.inner_params))
        memory = jax.tree.leaves(old.estimator_state)
        assert all(leaf.is_deleted() for leaf in memory if leaf.size > 1)
        state = run.ready(state)
    assert run.traces == 1


@every_method
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_stable_under_scan(name, dtype):
    run = run_of(name)
    cast = lambda tree: jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )
    batch = cast(run.batch(0))
    start = run.init()

    def steps(z, x):
        state = run.solver.init(z, x)
        return jax.lax.scan(lambda s, _: run.solver.update(s, batch), state, None, length=2)[0]

    # lax.scan refuses a carry that changes its type; nothing has to be compiled for that.
    state = jax.eval_shape(steps, cast(start.inner_params), cast(start.outer_params))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.variables)} == {jnp.dtype(dtype)}


@every_method
def test_quadratic_closed_form(name):
    run = run_of(name)
    state = run.advance(run.init(same=True), run.method.steps, same=True)
    target = data(True).x_star(run.method.response)
    found = flat(state.outer_params, OUTER)
    error = max(float(jnp.abs(found[k] - target[k]).max()) for k in target)
    start = data(True).outer_params
    assert max(float(jnp.abs(start[k] - target[k]).max()) for k in target) > 0.3
    assert error <= run.method.tolerance, error


@every_method
def test_a_step_that_is_not_finite_leaves_no_trace(name):
    run = run_of(name)
    state = run.ready(run.advance(run.init(), 2))
    poison = lambda leaf: leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    bad = jax.tree.map(poison, minibatches_of(False))
    copies = [jax.tree.map(jnp.array, state) for _ in range(2)]
    clean, _ = run.updated(copies[0], 2)
    clean, _ = run.updated(clean, 7)
    frozen, _ = run.updated(copies[1], 2)
    point = on_host(frozen.variables)
    frozen, info = run.updated(frozen, 7, minibatches=bad)
    assert not all(bool(flag) for flag in info.finite)
    assert int(frozen.step) == 3
    assert_same_bits(on_host(frozen.variables), point)
    frozen, info = run.updated(frozen, 7)
    assert all(bool(flag) for flag in info.finite)
    assert_same_bits(frozen, clean)


@every_method
def test_saved_and_restored_continues_bit_for_bit(name, tmp_path):
    run = run_of(name)
    straight = on_host(run.advance(run.init(), 7))
    half = run.advance(run.init(), 3)
    with Checkpointer(tmp_path, asynchronous=False) as checkpointer:
        checkpointer.save(3, half, {})
        restored = checkpointer.restore(run.init()).state
    assert_same_bits(run.advance(restored, 4), straight)


@every_method
def test_missing_outer_gradient_is_refused(name):
    """An outer leaf that the inner loss cannot see: one clear line, from every solver."""
    method = METHODS[name]
    blind = lambda loss: lambda z, x, batch: loss(z, jax.tree.map(jnp.zeros_like, x), batch)
    solver = method.make(nested_problem(blind), inner=sgd(0.1), outer=sgd(0.1))
    state = run_of(name).init()
    state = solver.init(state.inner_params, state.outer_params)
    with pytest.raises(ValueError, match="never uses outer_params"):
        jax.eval_shape(solver.update, state, run_of(name).batch(0))
